"""The directory name of a checkpoint, the only module that formats and parses it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"step_(\d{9,})-(\d{4,})")
_TEMPORARY, _DOOMED = ".writing-", ".deleting-"
_ATTEMPT = re.compile(r"-(\d{4,})$")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """`step_000000400-0003`; names are ordered by step, then by attempt.

    Attributes:
        step: optimiser steps done when the checkpoint was taken.
        attempt: number of the attempt of the run that wrote it.
    """

    step: int
    attempt: int

    def __str__(self) -> str:
        return f"step_{self.step:09d}-{self.attempt:04d}"

    @classmethod
    def parse(cls, name: str) -> CheckpointName | None:
        """The name in its parts; None if it is not the name of a checkpoint."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, path: Path) -> CheckpointName:
        """The name of a checkpoint's directory.

        Raises:
            ValueError: the directory is not named as a checkpoint.
        """
        found = cls.parse(path.name)
        if found is None:
            raise ValueError(f"{path.name} is not the name of a checkpoint, such as {cls(400, 3)}")
        return found


def checkpoints_below(run: Path) -> list[Path]:
    """All directories of a run that are named as checkpoints, oldest first, complete or not."""
    found = [(name, path) for path in (run / "checkpoints").glob("step_*") if (name := CheckpointName.parse(path.name))]
    return [path for _, path in sorted(found)]


def complete_inside(directory: Path) -> list[Path]:
    """The checkpoints with a manifest in a directory or in its checkpoints/, oldest first."""
    found = [file.parent for pattern in ("*", "checkpoints/*") for file in directory.glob(f"{pattern}/manifest.json")]
    return sorted(path for path in found if not path.name.startswith("."))


def find_weights(path: Path) -> Path:
    """What holds the weights of a path that a user gives: of a run its final weights, else its newest checkpoint.

    Args:
        path: a run directory, a checkpoint, or a file; anything else is returned as it is.
    """
    if not path.is_dir() or (path / "manifest.json").exists() or (path / "meta.json").exists():
        return path
    final, inside = path / "weights.pth", complete_inside(path)
    return final if final.exists() else inside[-1] if inside else path


def temporary_path(path: Path) -> Path:
    """Where a file or directory `NAME-ATTEMPT` is written before it is renamed into place."""
    return path.with_name(f"{_TEMPORARY}{path.name}")


def attempt_of_temporary(name: str) -> int | None:
    """The attempt that writes under a temporary name; None if it is not a temporary name."""
    match = _ATTEMPT.search(name)
    return int(match[1]) if match and name.startswith(_TEMPORARY) else None


def doomed_path(path: Path) -> Path:
    """The name that a directory gets before its files are deleted: nobody takes it for a checkpoint any more."""
    return path.with_name(f"{_DOOMED}{path.name}")


def is_doomed(name: str) -> bool:
    """Whether a directory of this name is being deleted, or was when its process ended."""
    return name.startswith(_DOOMED)
