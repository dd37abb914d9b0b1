"""The directory of a checkpoint: its name, what must be in it, and which of several is the newest whole one.

`step_000000400-0003` was written by the third start of its run, its attempt; without a number, by one from before
there were any. Which of them are the run's, rundir/lineage.py says.
"""

from __future__ import annotations

import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rwkv_train.checkpoint.storage import MANIFEST, LocalStorage, Storage, sha256
from rwkv_train.errors import UserError
from rwkv_train.rundir.attempts import Attempts

LATEST = "latest"  # beside the checkpoints, written last of all: the name of the newest one
_NAME = re.compile(r"step_(\d{9,})(?:-(\d{4,}))?")
_ASIDE = ".writing-"


def directory_name(step: int, attempt: int) -> str:
    return f"step_{step:09d}-{attempt:04d}"


def aside_of(path: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return path.with_name(f"{_ASIDE}{path.name}")


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's directory is named after; None: not such a name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def attempt_of(path: Path) -> int:
    """Whose it is by its name, finished or not; 0 where there is no number."""
    match = re.search(r"-(\d{4,})$", path.name)
    return int(match[1]) if match else 0


@dataclass(frozen=True)
class Damage:
    """Why a directory that looks like a checkpoint is not a whole one."""

    path: Path
    reason: str


def verify(path: Path, content: bool = True) -> Damage | None:
    """Compares every file of a checkpoint with its manifest; None: it is whole.

    Args:
        path: the directory.
        content: whether the files are read and hashed, or only measured.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        wrote = (manifest.get("attempt", 0), manifest.get("step", step_of(path)))
        if step_of(path) is not None and wrote != (attempt_of(path), step_of(path)):
            return Damage(path, f"{MANIFEST} is that of step {wrote[1]} by start {wrote[0]} of the run")
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return Damage(path, f"{MANIFEST} cannot be read ({type(error).__name__})")

    def reason(name: str, size: int, digest: str) -> str | None:
        try:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            return f"{name} has other content than was written" if content and sha256(path / name) != digest else None
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter's lock
        damaged = next(filter(None, pool.map(lambda file: reason(*file), files)), None)
    return Damage(path, damaged) if damaged else None


def counted(directory: Path, storage: Storage | None = None, head: int | None = None) -> list[Path]:
    """What lies there under a checkpoint's name and is the run's, the newest last.

    Args:
        directory: checkpoints/ of a run.
        storage: the file system.
        head: the attempt for which that is asked; None: whoever comes next.
    """
    lineage = Attempts(directory.parent).lineage(head)
    found = [Path(name) for name in (storage or LocalStorage()).names(directory) if _NAME.fullmatch(name)]
    steps = sorted((step_of(path) or 0, attempt_of(path), path) for path in found)
    return [directory / path for step, number, path in steps if lineage.counts(number, step)]


def newest(
    directory: Path, storage: Storage | None = None, content: bool = True, before: int | None = None
) -> tuple[Path | None, list[Damage]]:
    """The newest whole checkpoint of a run's directory (before a step), and the damaged ones that are newer than it."""
    damaged: list[Damage] = []
    for path in reversed(counted(directory, storage)):
        if before is not None and (step_of(path) or 0) >= before:
            continue
        damage = verify(path, content)
        if damage is None:
            return path, damaged
        damaged.append(damage)
    return None, damaged


def refuse_damage(path: Path, content: bool = True) -> None:
    """Raises a UserError where there is no whole checkpoint at `path`."""
    if not path.is_dir():
        raise UserError(f"there is no checkpoint at {path}", "give a directory like RUN/checkpoints/step_000001000")
    if damage := verify(path, content):
        raise UserError(f"the checkpoint {path} is damaged: {damage.reason}", "use an older one beside it")


def read_meta(path: Path) -> dict[str, Any]:
    """step, tokens, probe, shapes, config and versions of a whole checkpoint.

    Raises:
        UserError: the directory is missing, or lacks a file or a part of one (its content is not hashed here).
    """
    refuse_damage(path, content=False)
    return cast(dict[str, Any], json.loads((path / "meta.json").read_text()))


def remove_unfinished(directory: Path, attempt: int, storage: Storage | None = None) -> None:
    """Removes what killed saves of earlier attempts left behind, unless one that still lives is about to."""
    storage = storage or LocalStorage()
    for name in storage.names(directory):
        if name.startswith(_ASIDE) and attempt_of(Path(name)) < attempt:
            with contextlib.suppress(OSError):  # then the next start removes it
                storage.delete(directory / name)
