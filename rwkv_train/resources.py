"""What the package has at hand: its folders conf/ and cuda/, in a checkout or an installed wheel, and CPU cores."""

import os
from pathlib import Path
from typing import Literal


def resource(name: Literal["conf", "cuda"]) -> Path:
    """The folder of that name: the wheel's copy if the package was installed from a wheel, otherwise the checkout's."""
    package = Path(__file__).resolve().parent
    in_wheel = package / name
    return in_wheel if in_wheel.is_dir() else package.parent / name


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
