"""Records as JSON lines: one file per attempt, the merged view of all attempts, and write errors that cost no run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_train.rundir.attempts import Attempts
from rwkv_train.rundir.record_lines import LeftOut, Record, complete_lines, event_row, metrics_row, records_in
from rwkv_train.rundir.row_ranges import last_row_in, write_all

MetricsRow = Mapping[str, Any]  # a line of metrics.jsonl
EventRow = Mapping[str, Any]  # a line of events.jsonl


_LINES_AT_ONCE = 256  # of those that the disk has refused so far


class WriteErrors:
    """Writes that the disk refused: each is reported at once, and costs only what it would have written.

    Attributes:
        count: number of errors so far.
    """

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def tolerate(self, path: Path) -> Iterator[None]:
        """Reports and counts an OSError of the block instead of raising it."""
        try:
            yield
        except OSError as error:
            self.report(path, error)

    def report(self, path: Path, error: OSError) -> None:
        self.count += 1
        print(f"\nWARNING: {path} could not be written: {error.strerror or error}; training continues", file=sys.stderr)


class MergedView:
    """metrics.jsonl or events.jsonl of a run: the merged lines of all attempts, for people and tools.

    The file is built beside its final path and renamed, then appended to through the open file, by inode and not by
    name: an older attempt that is still alive keeps writing into its own former view, which has no name any more. The
    attempts' own files are authoritative; the view can be rebuilt from them at any time.

    Args:
        path: path of the view.
        number: of the attempt that writes it.
        attempts: of the run.
        merged: returns the records as seen from an attempt.
        copy: writes their lines to an unbuffered file; None: those of `merged`.
    """

    def __init__(
        self,
        path: Path,
        number: int,
        attempts: Attempts,
        merged: Callable[[int], Iterable[Record]],
        copy: Callable[[BinaryIO, int], None] | None = None,
    ) -> None:
        self.path, self.number, self._attempts = path, number, attempts
        self._merged, self._copy = merged, copy or self._write
        self._file: BinaryIO | None = None

    def records(self) -> Iterable[Record]:
        """What the view should have."""
        return self._merged(self.number)

    def last_row(self) -> MetricsRow | None:
        """The last row of metrics.jsonl that the view should have; None: there is none."""
        record = self._attempts.last_metrics(self._attempts.lineage(self.number))
        return None if record is None else record.row

    def _write(self, file: BinaryIO, number: int) -> None:
        write_all(file, b"".join(record.line for record in self._merged(number)))

    def rebuild(self) -> None:
        """Writes the view again, unless a newer attempt has one.

        Raises:
            OSError: the disk refused; the previous view stays.
        """
        if self._attempts.superseded(self.number):
            return
        temporary = self.path.with_name(f".{self.path.name}.{self.number:04d}")
        file = open(temporary, "w+b", buffering=0)  # noqa: SIM115  kept open
        try:
            self._copy(file, self.number)
            temporary.replace(self.path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        self.close()
        self._file = file

    @property
    def current(self) -> bool:
        """Whether the file that this attempt appends to is the one at the path."""
        return self._file is not None and _same_file(self._file, self.path)

    def append(self, lines: list[bytes]) -> None:
        """Adds lines that the attempt's own file already has, and removes from the list what is written.

        Raises:
            OSError: the disk refused.
        """
        if self._file is not None and self.current:
            append_all(self._file, lines)
        else:  # not built yet, or another process has put its own file there
            self.rebuild()
            lines.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonLines:
    """A file with one JSON object per line. Rows that a full disk refuses are kept and written with later ones.

    Args:
        path: the file, made with the first row. No other process writes to it.
        enabled: whether rows are written; False on all ranks but rank 0.
        view: the merged view to be updated too; None: there is none.
    """

    _parse = staticmethod(metrics_row)

    def __init__(self, path: Path, enabled: bool = True, view: MergedView | None = None) -> None:
        self.path, self.enabled, self.view = path, enabled, view
        self._unwritten: list[bytes] = []
        self._unmerged: list[bytes] = []

    @property
    def lost(self) -> int:
        """Number of rows that are not on the disk."""
        return max(len(self._unwritten), len(self._unmerged))

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row and hands it to the operating system, so that a killed process loses none."""
        if not self.enabled:
            return
        before = self.lost
        line = json.dumps(row).encode() + b"\n"
        self._unwritten.append(line)
        self._unmerged.append(line)
        try:
            with open(self.path, "a+b", buffering=0) as file:
                append_all(file, self._unwritten)
            if self.view is not None:
                self.view.append(self._unmerged)
            self._unmerged.clear()
        except OSError as error:
            if not before:
                path = self.path if self.view is None else self.view.path
                print(
                    f"\nWARNING: {path} could not be written: {error.strerror}; training continues, and its rows are "
                    "written once there is room",
                    file=sys.stderr,
                )

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows of the run so far, unwritten ones included; lines that are no records are left out."""
        if self.view is not None:
            found = self.view.records()
        else:
            left_out = LeftOut()
            lines = complete_lines(self.path, str(self.path), left_out) or []
            found = records_in(lines, self._parse, str(self.path), left_out)
        unwritten = records_in(self._unwritten, self._parse, "", LeftOut())
        return [record.row for record in (*found, *unwritten)]

    def last_row(self) -> MetricsRow | None:
        """The last row of `rows` of metrics.jsonl; no other is read."""
        if self._unwritten and (row := metrics_row(self._unwritten[-1])) is not None:
            return row
        return last_row_in(self.path) if self.view is None else self.view.last_row()

    def follow_attempt(self, path: Path) -> None:
        """Writes to the file of another attempt from now on: that of a run which was rewound."""
        self.path = path
        if self.view is not None:
            self.view.close()
            self.view.number = int(path.parent.name)
        self.refresh()

    def refresh(self, force: bool = False) -> None:
        """Rebuilds the merged view where it is not up to date; a write error is reported with the next row.

        Args:
            force: rebuild it in any case.
        """
        if self.enabled and self.view is not None and (force or self._unmerged or not self.view.current):
            with contextlib.suppress(OSError):
                self.view.rebuild()
                self._unmerged.clear()

    def close(self) -> None:
        """Brings the merged view up to date for the last time."""
        try:
            self.refresh()
        finally:
            if self.view is not None:
                self.view.close()


class Events(JsonLines):
    """What happened to the run: started, resumed, checkpoint, finished …, each with step, tokens and wall-clock time.

    Attributes:
        tokens: trained on after a step.
        listeners: called with each event.
    """

    _parse = staticmethod(event_row)

    def __init__(
        self,
        path: Path,
        enabled: bool = True,
        view: MergedView | None = None,
        tokens: Callable[[int], int] = lambda step: 0,
    ) -> None:
        super().__init__(path, enabled, view)
        self.tokens = tokens
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []

    def add(self, event: str, step: int, **details: Any) -> None:
        row = {"time": round(time.time(), 3), "event": event, "step": step, "tokens": self.tokens(step), **details}
        self.append(row)
        for listener in self.listeners:
            listener(row)

    def close(self) -> None:
        """Rebuilds the view once more: events of the watchdog are in a file of its own, which is not followed."""
        try:
            self.refresh(force=True)
        finally:
            super().close()


def append_all(file: BinaryIO, lines: list[bytes]) -> None:
    """Adds lines and removes from the list what is written. A disk that refuses is asked to take few of them.

    Raises:
        OSError: the disk refused.
    """
    while lines:
        part = lines[:_LINES_AT_ONCE]
        append(file, b"".join(part))
        del lines[: len(part)]


def append(file: BinaryIO, data: bytes) -> None:
    """Adds lines to an unbuffered file that can be read, all of them or none. They begin a new line in any case.

    Raises:
        OSError: the disk refused, or took a part, which is removed again.
    """
    end = file.seek(0, os.SEEK_END)
    if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # a part of a line that could not be removed
        data = b"\n" + data
    try:
        write_all(file, data)
    except OSError:  # a nearly full disk takes a part: no cut line stays
        os.ftruncate(file.fileno(), end)
        raise


def _same_file(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
