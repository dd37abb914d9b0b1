"""Finding and verifying checkpoints: what must be in the directory of a complete one, and which one is the newest.

Which checkpoints belong to the run is decided by the chain of its attempts, see rundir/attempts.py.
"""

from __future__ import annotations

import contextlib
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rwkv_train.checkpoint.meta import META, CheckpointMeta
from rwkv_train.checkpoint.name import CheckpointName, attempt_of_temporary, complete_inside, is_doomed
from rwkv_train.checkpoint.storage import MANIFEST, LocalStorage, Storage, sha256
from rwkv_train.errors import UserError
from rwkv_train.json_files import load_object
from rwkv_train.rundir.attempts import Attempts

WITHOUT_FINITE_LOSS = "no sample of its probe has a finite loss under its weights"
LATEST = "latest"  # file beside the checkpoints with the name of the newest one, written after everything else


@dataclass(frozen=True)
class Damage:
    """Why a directory that is named as a checkpoint is not a complete one."""

    path: Path
    reason: str


def verify(path: Path, content: bool = True) -> Damage | None:
    """Compares every file of a checkpoint with its manifest.

    Args:
        path: the directory.
        content: whether files are read and hashed, or only their sizes compared.

    Returns:
        the first difference; None if the checkpoint is complete.
    """
    try:
        manifest = load_object(path / MANIFEST)
        written, name = CheckpointName(manifest["step"], manifest["attempt"]), CheckpointName.parse(path.name)
        if name is not None and written != name:
            return Damage(path, f"{MANIFEST} belongs to {written}")
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
        if odd := next((name for name, _, _ in files if not _is_plain(name)), None):
            return Damage(path, f"{MANIFEST} names {odd!r:.100}, which is not the name of a file in the directory")
        if META not in manifest["files"]:
            return Damage(path, f"{MANIFEST} lacks {META}")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return Damage(path, f"{MANIFEST} cannot be read ({type(error).__name__})")

    def difference(name: str, size: int, digest: str) -> str | None:
        try:
            state = (path / name).stat()
            if not stat.S_ISREG(state.st_mode):
                return f"{name} is not a regular file"
            if state.st_size != size:
                return f"{name} has {state.st_size} bytes, not {size}"
            return f"{name} has other content than was written" if content and sha256(path / name) != digest else None
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter's lock
        damaged = next(filter(None, pool.map(lambda file: difference(*file), files)), None)
    return Damage(path, damaged) if damaged else None


def unusable(path: Path, content: bool = True) -> Damage | None:
    """Why a run does not resume from a checkpoint: it is damaged, or its weights give no finite loss; else None.

    Args:
        path, content: as for `verify`.
    """
    damage = verify(path, content)
    if damage is None:
        with contextlib.suppress(UserError):  # raised where the checkpoint is used
            if CheckpointMeta.read(path).probe is None:
                return Damage(path, WITHOUT_FINITE_LOSS)
    return damage


def _is_plain(name: str) -> bool:
    """Whether a name leads to a file in the directory itself, and to nothing else."""
    return bool(name) and name not in (".", "..") and "/" not in name and "\0" not in name


def list_checkpoints(directory: Path, storage: Storage | None = None, head: int | None = None) -> list[Path]:
    """The directories that are named as checkpoints and belong to the run, oldest first; they may be damaged.

    Args:
        directory: checkpoints/ of a run.
        storage: the file system.
        head: the attempt from whose view the run is seen; None: from that of an attempt that would start now.
    """
    lineage = Attempts(directory.parent).lineage(head)
    names = map(CheckpointName.parse, (storage or LocalStorage()).names(directory))
    return [directory / str(name) for name in sorted(filter(None, names)) if lineage.includes(name.attempt, name.step)]


def newest(
    directory: Path, storage: Storage | None = None, content: bool = True, before: int | None = None
) -> tuple[Path | None, list[Damage]]:
    """The newest checkpoint of a run that can be resumed from, and the others that are newer than it.

    Args:
        directory: checkpoints/ of a run.
        storage: the file system.
        content: as for `verify`.
        before: only checkpoints of earlier steps than this one; None: all.
    """
    damaged: list[Damage] = []
    for path in reversed(list_checkpoints(directory, storage)):
        if before is not None and CheckpointName.of(path).step >= before:
            continue
        damage = unusable(path, content)
        if damage is None:
            return path, damaged
        damaged.append(damage)
    return None, damaged


def newest_to_resume(
    directory: Path, storage: Storage | None = None, content: bool = True
) -> tuple[Path | None, list[Damage]]:
    """The checkpoint from which `resume=auto` continues, and the damaged ones that it passes over.

    Returns:
        None only for a run that has no checkpoints.

    Raises:
        UserError: there are checkpoints, but all are damaged, or none belongs to the run. Beside checkpoints, a run
            starts at step 0 only if the user asks for it.
    """
    attempts = Attempts(directory.parent)
    attempts.refuse_orphans()
    found, damaged = newest(directory, storage, content)
    if found is not None:
        return found, damaged
    names = filter(None, map(CheckpointName.parse, (storage or LocalStorage()).names(directory)))
    complete = [path for name in sorted(names) if unusable(path := directory / str(name), content=False) is None]
    others = [path for path in complete if path not in {damage.path for damage in damaged}]
    remedy = "run.name=NEW starts a new run" + (
        f"; resume={others[-1]} continues from that checkpoint" if others else ""
    )
    if damaged:
        reasons = "; ".join(f"{damage.path.name}: {damage.reason}" for damage in damaged)
        raise UserError(
            f"all checkpoints of the run in {directory} are damaged: {reasons}", f"restore one, or {remedy}"
        )
    if others:
        raise UserError(
            f"{directory} holds complete checkpoints such as {others[-1].name}, but by {attempts.path}/*/start.json "
            "none of them belongs to the run, which would start at step 0",
            remedy,
        )
    return None, []


def refuse_damage(path: Path, content: bool = True) -> None:
    """Raises a UserError if there is no complete checkpoint at `path`."""
    example = f"give a directory like RUN/checkpoints/{CheckpointName(1000, 1)}"
    if not path.is_dir():
        raise UserError(f"there is no checkpoint at {path}", example)
    if not (path / MANIFEST).exists():
        inside = complete_inside(path)
        raise UserError(
            f"{path} is not a complete checkpoint: it has no {MANIFEST}", f"use {inside[-1]}" if inside else example
        )
    if damage := verify(path, content):
        raise UserError(f"the checkpoint {path} is damaged: {damage.reason}", "use an older one beside it")


def read_meta(path: Path) -> CheckpointMeta:
    """The description of a complete checkpoint.

    Raises:
        UserError: the directory is missing, or lacks a file or a part of one (content is not hashed here).
    """
    refuse_damage(path, content=False)
    return CheckpointMeta.read(path)


def remove_unfinished(directory: Path, attempt: int, storage: Storage | None = None) -> None:
    """Removes what killed saves of earlier attempts and killed deletions left.

    A newer attempt may be writing at this moment; what is being deleted may be deleted by several.
    """
    storage = storage or LocalStorage()
    for name in storage.names(directory):
        writer = attempt_of_temporary(name)
        if is_doomed(name) or (writer is not None and writer < attempt):
            with contextlib.suppress(OSError):  # the next attempt tries again
                storage.delete(directory / name)
