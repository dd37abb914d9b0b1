"""Writes checkpoints in the background: every rank its own files, the first one the manifest when all are there.

    step_000000123-0001/    the step, and the start of the run that wrote it
        weights.pth     the parameters under the field's names: a plain dict, loads in every RWKV runtime
        state.pth       Adam's moments by parameter name, random state
        meta.json       step, tokens, probe loss, shapes, settled config, versions
        manifest.json   whose it is, size and SHA-256 of the others, written last: without it this is no checkpoint
    latest              the newest one's name

Where several ranks hold the state, each writes weights_0001_of_0008.pth and state_0001_of_0008.pth with its pieces. All
is written beside its final place, every file synced, then renamed: a kill leaves a whole checkpoint or none. The ranks
tell each other about their files through a key-value store of their own, never by collectives: a save cannot hang the
training, and a rank that fails says so.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from rwkv_train.checkpoint.commit import Commit, Word
from rwkv_train.checkpoint.directory import LATEST, aside_of, attempt_of, step_of
from rwkv_train.checkpoint.storage import MANIFEST, Hashing, Storage, dump

PATIENCE = timedelta(minutes=60)  # how long the first rank waits for the files of the others


class Board(Protocol):
    """Where ranks leave word for each other: torch.distributed.TCPStore, or a dict's methods for one rank alone."""

    def set(self, key: str, value: str) -> None: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...

    def get(self, key: str) -> bytes: ...


class OwnBoard:
    """The board of a single process."""

    def __init__(self) -> None:
        self._words: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self._words[key] = value.encode()

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        assert all(key in self._words for key in keys)

    def get(self, key: str) -> bytes:
        return self._words[key]


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    path: Path
    seconds: float
    error: str | None = None  # why it failed


class Writer:
    """One save at a time, in a thread; a new one waits for the one before.

    Args:
        storage: the file system.
        rank: of this process.
        writers: ranks that write files, the first ones.
        board: shared by all ranks.
        kept: called by the first rank after a checkpoint has its name; deletes those that need not stay.
    """

    def __init__(
        self, storage: Storage, rank: int, writers: int, board: Board, kept: Callable[[], None] = lambda: None
    ) -> None:
        self.storage, self.rank, self.writers, self.board, self.kept = storage, rank, writers, board, kept
        self._thread: threading.Thread | None = None
        self._outcomes: list[Outcome] = []
        self._saves = 0

    def begin(self, final: Path, files: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts a save.

        Args:
            final: the checkpoint's directory.
            files: name → what torch.save writes; nobody may change it before the save has ended.
            meta: for meta.json; the first rank's counts.
        """
        self.wait()
        self._saves += 1
        arguments = (final, files, meta, f"{self._saves}/{final.name}")
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether this rank's part of the last save is done; the first rank's is done when the whole is."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when this rank is idle."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finished(self) -> list[Outcome]:
        """The saves that have ended since the last call; the first rank's tell of the whole checkpoint."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _save(self, final: Path, files: Mapping[str, Any], meta: Mapping[str, Any], key: str) -> None:
        began, aside = time.perf_counter(), aside_of(final)
        step, number, error = step_of(final) or 0, attempt_of(final), None
        try:
            if self.rank < self.writers:
                word = Word(number, step, self.rank, self._write(aside, files))
                self.board.set(f"{key}/{self.rank}", json.dumps(word.as_json()))
            if self.rank == 0:
                self._complete(final, aside, meta, key)
        except Exception as caught:  # whatever it is, training goes on, and the first rank must not wait for this one
            error = (getattr(caught, "strerror", None) or str(caught)) if isinstance(caught, OSError) else repr(caught)
            if self.rank:
                with contextlib.suppress(Exception):  # the first rank is gone, and its board with it
                    self.board.set(f"{key}/{self.rank}", json.dumps(Word(number, step, self.rank, {}, error).as_json()))
        self._outcomes.append(Outcome(final, time.perf_counter() - began, error))

    def _write(self, aside: Path, files: Mapping[str, Any]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, value in files.items():
            with self.storage.write(aside / name) as file:
                hashing = Hashing(file)
                if name.endswith(".pth"):
                    dump(value, cast(BinaryIO, hashing))
                else:
                    hashing.write(json.dumps(value, indent=1).encode())
            entries[name] = hashing.entry()
        return entries

    def _complete(self, final: Path, aside: Path, meta: Mapping[str, Any], key: str) -> None:
        commit = Commit(attempt_of(final), step_of(final) or 0, self.writers)
        keys = [f"{key}/{rank}" for rank in commit.missing]
        self.board.wait(keys, PATIENCE)
        for key in keys:
            commit.hear(Word(**json.loads(self.board.get(key))))
        if commit.error is not None:
            raise OSError(0, commit.error)
        marker = commit.marker(self._write(aside, {"meta.json": meta}))
        with self.storage.write(aside / MANIFEST) as file:
            file.write(json.dumps(marker, indent=1).encode())
        self.storage.rename(aside, final)
        latest = final.with_name(LATEST)
        beside = aside_of(latest.with_name(f"{LATEST}-{commit.attempt:04d}"))
        try:
            with self.storage.write(beside) as file:
                file.write(final.name.encode())
            self.storage.rename(beside, latest)
        except OSError:  # the disk took the checkpoint and not this, which is for people only
            self.storage.delete(beside)
        self.kept()
