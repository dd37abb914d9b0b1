"""The run's own records: JSON lines, a file for each attempt, and their merge; and what the disk refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_train.rundir.attempts import Attempts


class WriteErrors:
    """Writes that the disk refused: each is told at once, loudly, and costs no more than what it would have written."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def tolerate(self, path: Path) -> Iterator[None]:
        """Tells an OSError of the block, counts it, and goes on behind the block."""
        try:
            yield
        except OSError as error:
            self.tell(path, error)

    def tell(self, path: Path, error: OSError) -> None:
        self.count += 1
        print(f"\nWARNING: {path} could not be written: {error.strerror or error}; the run goes on", file=sys.stderr)


class Shown:
    """metrics.jsonl or events.jsonl: the merge of what all attempts have written, for people and tools.

    It is made anew beside its place and renamed, and then followed through the open file, by its inode and not by its
    name: an older attempt that is still alive goes on writing into the file that it once put there, which has no
    name any more. The truth are the attempts' own files; this one can be made again at any time.

    Args:
        path: of the merge.
        number: of this attempt.
        attempts: of the run.
        merged: the lines, up to this attempt's.
    """

    def __init__(self, path: Path, number: int, attempts: Attempts, merged: Callable[[int], Iterable[bytes]]) -> None:
        self.path, self.number, self._attempts = path, number, attempts
        self._merged = merged
        self._file: BinaryIO | None = None

    def lines(self) -> Iterable[bytes]:
        """What should stand there."""
        return self._merged(self.number)

    def renew(self) -> None:
        """Makes the merge anew, unless a newer attempt shows its own.

        Raises:
            OSError: the disk refused; what was there stays.
        """
        if self._attempts.superseded(self.number):
            return
        aside = self.path.with_name(f".{self.path.name}.{self.number:04d}")
        file = open(aside, "w+b", buffering=0)  # noqa: SIM115  kept open
        try:
            append(file, b"".join(self.lines()))
            aside.replace(self.path)
        except OSError:
            file.close()
            aside.unlink(missing_ok=True)
            raise
        self.close()
        self._file = file

    @property
    def current(self) -> bool:
        """Whether what this attempt follows is what stands at the path."""
        return self._file is not None and _same(self._file, self.path)

    def follow(self, lines: bytes) -> None:
        """Adds what the attempt's own file has just got.

        Raises:
            OSError: the disk refused.
        """
        if self._file is not None and self.current:
            append(self._file, lines)
        else:  # nobody has made it yet, or somebody else has put another one there
            self.renew()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonLines:
    """A file of one JSON object per line. Rows that a full disk refuses wait, and are written with the next ones.

    Args:
        path: the file; made when the first row comes. Nobody else writes into it.
        enabled: False on all ranks but the first: nothing is written.
        shown: the merge that shall follow.
    """

    def __init__(self, path: Path, enabled: bool = True, shown: Shown | None = None) -> None:
        self.path, self.enabled, self.shown = path, enabled, shown
        self._waiting: list[bytes] = []
        self._unshown: list[bytes] = []

    @property
    def lost(self) -> int:
        """Rows that are not in the file."""
        return max(len(self._waiting), len(self._unshown))

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row and hands it to the operating system, so that a killed process loses none."""
        if not self.enabled:
            return
        before = self.lost
        line = json.dumps(row).encode() + b"\n"
        self._waiting.append(line)
        self._unshown.append(line)
        try:
            with open(self.path, "ab", buffering=0) as file:
                append(file, b"".join(self._waiting))
            self._waiting.clear()
            if self.shown is not None:
                self.shown.follow(b"".join(self._unshown))
            self._unshown.clear()
        except OSError as error:
            if not before:
                path = self.path if self.shown is None else self.shown.path
                print(
                    f"\nWARNING: {path} could not be written: {error.strerror}; the run goes on, its rows wait",
                    file=sys.stderr,
                )

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows of the run up to now, those that wait too; a last line that a kill left torn is not one."""
        if self.shown is not None:
            lines = list(self.shown.lines())
        else:
            lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        return [json.loads(line) for line in [*lines, *self._waiting]]

    def go_on(self, path: Path) -> None:
        """The rows go into another attempt's file from now on, that of a run which went back."""
        self.path = path
        if self.shown is not None:
            self.shown.close()
            self.shown.number = int(path.parent.name)
        self.show()

    def show(self, anew: bool = False) -> None:
        """Makes the merge anew, in any case or where it is not current; what the disk refuses the next row tells."""
        if self.enabled and self.shown is not None and (anew or self._unshown or not self.shown.current):
            with contextlib.suppress(OSError):
                self.shown.renew()
                self._unshown.clear()

    def close(self) -> None:
        """Brings the merge up to date for the last time."""
        try:
            self.show()
        finally:
            if self.shown is not None:
                self.shown.close()


class Events(JsonLines):
    """What happened to the run: started, resumed, checkpoint, finished …, with step, tokens and wall-clock time."""

    def __init__(self, path: Path, enabled: bool = True, shown: Shown | None = None, tokens_per_step: int = 0) -> None:
        super().__init__(path, enabled, shown)
        self.tokens_per_step = tokens_per_step

    def add(self, event: str, step: int, **details: Any) -> None:
        tokens = step * self.tokens_per_step
        self.append({"time": round(time.time(), 3), "event": event, "step": step, "tokens": tokens, **details})

    def close(self) -> None:
        """The watchdog has a file of its own, which nothing follows."""
        self.show(anew=True)
        super().close()


def append(file: BinaryIO, data: bytes) -> None:
    """Adds bytes to an unbuffered file, all of them or none.

    Raises:
        OSError: the disk refused, or took a part, which is removed again.
    """
    end = file.seek(0, os.SEEK_END)
    if file.write(data) < len(data):  # a disk that is nearly full takes a part: no torn line stays
        os.ftruncate(file.fileno(), end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
