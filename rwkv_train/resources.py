"""Finds conf/ and cuda/: at the top of a checkout, or inside the package of an installed wheel."""

from pathlib import Path
from typing import Literal


def resource(name: Literal["conf", "cuda"]) -> Path:
    """The folder of that name: the wheel's copy if the package was installed from a wheel, otherwise the checkout's."""
    package = Path(__file__).resolve().parent
    in_wheel = package / name
    return in_wheel if in_wheel.is_dir() else package.parent / name
