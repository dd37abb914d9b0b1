"""The file system under a checkpoint: four calls, and a file that hashes what is written to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from rwkv_train.checkpoint.name import doomed_path
from rwkv_train.rundir.durable import sync_directory

MANIFEST = "manifest.json"
INDEX = "index.json"  # of a checkpoint that several ranks have written: which elements are in which file


class Storage(Protocol):
    """What a checkpoint needs of a file system; tests replace it by a slow or a full one."""

    def write(self, path: Path) -> Any:
        """A context manager over a binary file, which is synced to the disk at its end if nothing was raised."""

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
        """Gives a file or directory its final name; that and the names in it are on the disk afterwards."""
        if source.is_dir():
            sync_directory(source)
        os.rename(source, target)
        sync_directory(target.parent)

    def delete(self, path: Path) -> None:
        """Deletes a file or a directory; of a symbolic link the link, never what it points to.

        A directory that others may see is renamed first, to a name that nobody counts: what is left of it after a kill
        is no checkpoint, and the next start removes it.
        """
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        if not path.name.startswith("."):
            doomed = doomed_path(path)
            _remove_tree(doomed)
            self.rename(path, doomed)
            path = doomed
        _remove_tree(path)

    def names(self, directory: Path) -> list[str]:
        return sorted(os.listdir(directory)) if directory.is_dir() else []


def _remove_tree(path: Path) -> None:
    """Removes a directory, which another process may be removing at the same time."""
    while path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


class Hashing:
    """A write-only file that keeps the SHA-256 and size of what was written."""

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


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def dump(value: Any, file: BinaryIO) -> None:
    """torch.save into an open file.

    Raises:
        OSError: the disk refused; torch.save by itself raises a RuntimeError instead.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
