"""Where the files that are no Python lie: conf/ and cuda/ at the top of a checkout, inside the package in a wheel."""

from pathlib import Path
from typing import Literal


def resource(name: Literal["conf", "cuda"]) -> Path:
    """The folder of that name: the wheel's copy if this package came from a wheel, else the checkout's."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
