"""How a checkpoint is written, verified, found and loaded. When that happens is callbacks/checkpointing.py's matter.

A checkpoint is a directory `step_000000123/` with

    weights.pth     the parameters under the field's names: a plain dict, loads in every RWKV runtime
    state.pth       the optimiser's state keyed by parameter name, Lightning's counters, random states
    meta.json       step, tokens, probe loss, settled config, versions
    manifest.json   size and SHA-256 of the others, written last: without it the directory is no checkpoint

It is written beside its final place, every file synced, then renamed: a kill leaves a whole checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import torch

from rwkv_train.errors import UserError
from rwkv_train.models.weights import load_weights

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{9,})")


class Storage(Protocol):
    """What a checkpoint needs of a file system; tests put a slow, full or torn one here."""

    def write(self, path: Path) -> Any:
        """A context manager that gives a binary file, synced to the disk when it is left without an exception."""

    def rename(self, source: Path, target: Path) -> None: ...

    def delete(self, path: Path) -> None: ...

    def names(self, directory: Path) -> list[str]: ...


class LocalStorage:
    """Files of a POSIX file system."""

    @contextmanager
    def write(self, path: Path) -> Iterator[BinaryIO]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the new name itself is on the disk
        finally:
            os.close(directory)

    def delete(self, path: Path) -> None:
        if path.is_dir():
            (path / MANIFEST).unlink(missing_ok=True)  # first, so that a kill in between leaves no seeming checkpoint
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def names(self, directory: Path) -> list[str]:
        return sorted(os.listdir(directory)) if directory.is_dir() else []


class _Hashing:
    """A file that only takes writes and knows the hash and size of what passed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self._hash = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}


def directory_name(step: int) -> str:
    return f"step_{step:09d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's directory is named after; None: not such a name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def by_name(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state_dict, keyed by parameter name instead of by number: {name: {moment: tensor}}."""
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    return {names[index]: moments for index, moments in state["state"].items()}


def by_number(named: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `by_name`, for this optimiser's order of parameters; the groups are its own."""
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    return {
        "state": {i: named[name] for i, name in enumerate(names) if name in named},
        "param_groups": state["param_groups"],
    }


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def dump(value: Any, file: BinaryIO) -> None:
    """torch.save into an open file.

    Raises:
        OSError: the disk refused; torch.save by itself makes a RuntimeError of it.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


@dataclass(frozen=True)
class Damage:
    """Why a directory that looks like a checkpoint is not a whole one."""

    path: Path
    reason: str


def verify(path: Path) -> Damage | None:
    """Compares every file of a checkpoint with its manifest; None: it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return Damage(path, f"{MANIFEST} cannot be read ({type(error).__name__})")
    for name, entry in files:
        try:
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return Damage(path, f"{name} has {size} bytes, not {entry['bytes']}")
            if sha256(path / name) != entry["sha256"]:
                return Damage(path, f"{name} has other content than was written")
        except OSError as error:
            return Damage(path, f"{name} cannot be read ({error.strerror})")
    return None


def newest(directory: Path, storage: Storage | None = None) -> tuple[Path | None, list[Damage]]:
    """The newest whole checkpoint of a directory, and the damaged ones that are newer than it."""
    found = [directory / name for name in (storage or LocalStorage()).names(directory) if _NAME.fullmatch(name)]
    damaged: list[Damage] = []
    for path in sorted(found, key=lambda path: step_of(path) or 0, reverse=True):
        damage = verify(path)
        if damage is None:
            return path, damaged
        damaged.append(damage)
    return None, damaged


def read_meta(path: Path) -> dict[str, Any]:
    """step, tokens, probe, config and versions of a whole checkpoint.

    Raises:
        UserError: the directory is missing or not a whole checkpoint.
    """
    if not path.is_dir():
        raise UserError(f"there is no checkpoint at {path}", "give a directory like RUN/checkpoints/step_000001000")
    if damage := verify(path):
        raise UserError(f"the checkpoint {path} is damaged: {damage.reason}", "use an older one beside it")
    return cast(dict[str, Any], json.loads((path / "meta.json").read_text()))


def save(content: Mapping[str, Any], final: Path, storage: Storage) -> None:
    """Writes a checkpoint directory.

    Args:
        content: `weights` and `meta` get a file of their own, all else goes into state.pth.

    Raises:
        OSError: the disk refused; what was written is beside the final place, under a name that is no checkpoint.
    """
    aside = final.with_name(f".writing-{final.name}")
    state = {key: value for key, value in content.items() if key not in ("weights", "meta")}
    storage.delete(aside)
    files: dict[str, Any] = {}
    for name, value in (("weights.pth", content["weights"]), ("state.pth", state), ("meta.json", content["meta"])):
        with storage.write(aside / name) as file:
            hashing = _Hashing(file)
            if name.endswith(".pth"):
                dump(value, cast(BinaryIO, hashing))
            else:
                hashing.write(json.dumps(value, indent=1).encode())
        files[name] = hashing.entry()
    with storage.write(aside / MANIFEST) as file:
        file.write(json.dumps({"files": files}, indent=1).encode())
    if final.exists():
        storage.delete(final)  # a damaged one of the same step
    storage.rename(aside, final)


def load(path: Path) -> dict[str, Any]:
    """The inverse of `save`, on the CPU.

    Raises:
        UserError: the directory is missing or not a whole checkpoint.
    """
    meta = read_meta(path)
    state = torch.load(path / "state.pth", map_location="cpu", weights_only=True)
    return {**state, "weights": load_weights(path), "meta": meta}


def remove_unfinished(directory: Path, storage: Storage | None = None) -> None:
    """Removes what a killed save left behind."""
    storage = storage or LocalStorage()
    for name in storage.names(directory):
        if name.startswith(".writing-"):
            storage.delete(directory / name)


def set_aside_newer(directory: Path, step: int) -> None:
    """Renames the checkpoints after a step to left_step_…: a run that goes on from an older one does not find them."""
    for path in sorted(directory.iterdir()):
        if (later := step_of(path)) is not None and later > step:
            path.rename(path.with_name(f"left_{path.name}"))
