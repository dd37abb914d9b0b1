"""Writes checkpoints in the background: each rank its own files, rank 0 the manifest once all of them are on the disk.

    step_000000123-0001/    the step, and the attempt of the run that wrote it
        weights.pth     parameters under the field's names: a plain dict that loads in every RWKV runtime
        state.pth       Adam's moments by parameter name, random state
        meta.json       step, tokens, probe loss, shapes, settled configuration, versions
        manifest.json   attempt and step, size and SHA-256 of the other files; written last: without it the directory
                        is no checkpoint
    latest              name of the newest one

Where several ranks hold the state, each writes weights_0001_of_0008.pth and state_0001_of_0008.pth with its shards, and
rank 0 an index.json of all: then a rank that resumes opens only the files that it needs.
Everything is written under a temporary name, every file synced, then renamed: a kill leaves a complete checkpoint or
none. The ranks exchange messages about their files through a key-value store of their own, never by collectives: a save
cannot block training, and a rank that fails reports why.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from rwkv_train.checkpoint.commit import Ack, Commit
from rwkv_train.checkpoint.directory import LATEST
from rwkv_train.checkpoint.meta import META, CheckpointMeta
from rwkv_train.checkpoint.name import CheckpointName, temporary_path
from rwkv_train.checkpoint.storage import INDEX, MANIFEST, Hashing, Storage, dump
from rwkv_train.errors import UserError
from rwkv_train.json_files import parse_json

ACK_TIMEOUT = timedelta(minutes=60)  # how long rank 0 waits for the other ranks' files


class KeyValueStore(Protocol):
    """Where ranks leave messages for each other: torch.distributed.TCPStore, or InProcessStore for a single rank."""

    def set(self, key: str, value: str) -> None: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...

    def get(self, key: str) -> bytes: ...

    def delete_key(self, key: str) -> bool: ...


class InProcessStore:
    """The key-value store of a single process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        assert all(key in self._values for key in keys)

    def get(self, key: str) -> bytes:
        return self._values[key]

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended.

    Attributes:
        path: the checkpoint's directory.
        seconds: from the start of the background write to its end.
        error: why it failed; None if it succeeded.
        trouble: what failed after the checkpoint was complete; None: nothing.
    """

    path: Path
    seconds: float
    error: str | None = None
    trouble: str | None = None


class Writer:
    """Writes one checkpoint at a time, in a thread; a new save waits for the previous one.

    Args:
        storage: the file system.
        rank: of this process.
        writers: number of ranks that write files; they are the first ones.
        store: the key-value store that all ranks share.
        on_commit: called by rank 0 after a checkpoint has its final name; deletes checkpoints that are not kept. What
            it raises does not make the save fail.
    """

    def __init__(
        self,
        storage: Storage,
        rank: int,
        writers: int,
        store: KeyValueStore,
        on_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.storage, self.rank, self.writers, self.store, self.on_commit = storage, rank, writers, store, on_commit
        self._thread: threading.Thread | None = None
        self._outcomes: deque[SaveOutcome] = deque()  # the writing thread appends, training takes
        self._keys: list[str] = []  # keys of the last save, which rank 0 deletes before the next one
        self._saves = 0

    def begin(
        self,
        final: Path,
        files: Mapping[str, Any],
        meta: CheckpointMeta,
        index: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts a save.

        Args:
            final: the checkpoint's directory, named by its step and attempt.
            files: name → what torch.save writes; must not change before the save has ended.
            meta: description of the checkpoint; rank 0's is written.
            index: which elements are in `files`, as for `Ack`; None: not known, and readers open all files.
        """
        self.wait()
        self._saves += 1
        arguments = (final, files, meta, f"{self._saves}/{final.name}", index)
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether this rank's part of the last save has ended; rank 0's ends with the complete save."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when this rank is idle."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finished(self) -> list[SaveOutcome]:
        """The saves that have ended since the last call; rank 0's outcome is that of the complete checkpoint."""
        found = []
        while self._outcomes:
            found.append(self._outcomes.popleft())
        return found

    def _save(
        self,
        final: Path,
        files: Mapping[str, Any],
        meta: CheckpointMeta,
        key: str,
        index: Mapping[str, Any] | None = None,
    ) -> None:
        began, temporary = time.perf_counter(), temporary_path(final)
        name, error, trouble = CheckpointName.of(final), None, None
        try:
            self._delete_keys(key)
            if self.rank < self.writers:
                ack = Ack(name.attempt, name.step, self.rank, self._write(temporary, files), index=index)
                self.store.set(f"{key}/{self.rank}", json.dumps(ack.as_json()))
            if self.rank == 0:
                self._complete(final, temporary, meta, key)
                trouble = self._after_commit(final)
        except Exception as caught:  # training continues whatever it is, and rank 0 must not wait for this rank
            error = _reason(caught)
            if self.rank:
                ack = Ack(name.attempt, name.step, self.rank, {}, error)
                with contextlib.suppress(Exception):  # rank 0 may have ended, and its store with it
                    self.store.set(f"{key}/{self.rank}", json.dumps(ack.as_json()))
            else:
                self._remove_failed(temporary, key)
        self._outcomes.append(SaveOutcome(final, time.perf_counter() - began, error, trouble))

    def _delete_keys(self, key: str) -> None:
        """Rank 0: deletes the messages of the previous save, which has ended on all ranks; else they would pile up."""
        if self.rank:
            return
        old, self._keys = self._keys, [f"{key}/{rank}" for rank in range(self.writers)]
        for name in old:
            self.store.delete_key(name)

    def _remove_failed(self, temporary: Path, key: str) -> None:
        """Rank 0: removes what all ranks have written of a save that failed, once none of them writes any more."""
        with contextlib.suppress(Exception):  # a rank that died; the next attempt removes what is left
            if self.writers > 1:
                self.store.wait([f"{key}/{rank}" for rank in range(1, self.writers)], ACK_TIMEOUT)
            self.storage.delete(temporary)

    def _write(self, directory: Path, files: Mapping[str, Any]) -> dict[str, Any]:
        """Writes files; returns the size and checksum of each."""
        entries: dict[str, Any] = {}
        for name, value in files.items():
            with self.storage.write(directory / name) as file:
                hashing = Hashing(file)
                if name.endswith(".pth"):
                    dump(value, cast(BinaryIO, hashing))
                else:
                    hashing.write(json.dumps(value, indent=None if name == INDEX else 1, allow_nan=False).encode())
            entries[name] = hashing.entry()
        return entries

    def _complete(self, final: Path, temporary: Path, meta: CheckpointMeta, key: str) -> None:
        """Rank 0: waits for all acks, writes the manifest, and gives the checkpoint its final name."""
        name = CheckpointName.of(final)
        commit = Commit(name.attempt, name.step, self.writers)
        keys = [f"{key}/{rank}" for rank in commit.missing]
        self.store.wait(keys, ACK_TIMEOUT)
        for key in keys:
            commit.receive(Ack(**parse_json(self.store.get(key))))
        if commit.error is not None:
            raise OSError(0, commit.error)
        index = commit.index() if self.writers > 1 else None
        described = {META: meta.as_json(), **({} if index is None else {INDEX: index})}
        manifest = commit.manifest(self._write(temporary, described))
        with self.storage.write(temporary / MANIFEST) as file:
            file.write(json.dumps(manifest, indent=1).encode())
        self.storage.rename(temporary, final)

    def _after_commit(self, final: Path) -> str | None:
        """Names the newest checkpoint and deletes old ones; returns what failed of that, for the save has not."""
        trouble = []
        for action in (partial(self._name_latest, final), self.on_commit):
            try:
                action()
            except Exception as caught:
                trouble.append(_reason(caught))
        return "; ".join(trouble) or None

    def _name_latest(self, final: Path) -> None:
        latest = final.with_name(LATEST)
        renamed = temporary_path(latest.with_name(f"{LATEST}-{CheckpointName.of(final).attempt:04d}"))
        try:
            with self.storage.write(renamed) as file:
                file.write(final.name.encode())
            self.storage.rename(renamed, latest)
        except OSError:  # the disk took the checkpoint but not this file, which only people read
            self.storage.delete(renamed)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return " ".join(str(error).split()) if isinstance(error, UserError) else repr(error)
