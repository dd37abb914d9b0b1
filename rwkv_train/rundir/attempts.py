"""The attempts of a run: each start of a run is one, and writes only below its own numbered directory.

    attempts/0003/
        start.json        the checkpoint it continues from, written before its first row
        metrics.jsonl     its rows
        events.jsonl      its events; watchdog.jsonl has those of its watchdog
        stacks_rank_0001.txt …

A number is claimed by making the directory, which succeeds for one process only, on NFS too. The attempt looks for a
checkpoint to continue from after that: then an older attempt that saves once more has either been seen, or sees in
turn that a newer attempt has begun, and deletes nothing.

An older attempt may still be alive: paused before a write, or on a node that the cluster has given up. It cannot be
kept from writing, so what it writes is made not to count. The start notes form a chain from the newest attempt back,
and the chain defines which steps of which attempt are the run's. No clock is involved.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_train.errors import UserError
from rwkv_train.json_files import load_object, open_regular, reason_of
from rwkv_train.rundir.durable import sync_directory, write_durably
from rwkv_train.rundir.record_lines import LeftOut, Record, complete_lines, event_row, metrics_row, records_in
from rwkv_train.rundir.row_ranges import complete_size, copy_rows, end_of_steps, last_row_before, rows_between

EVENT_FILES = ("events.jsonl", "watchdog.jsonl")  # of one attempt: the run's own, the watchdog's
_NOTE = "start.json"


class Superseded(Exception):
    """A newer attempt of the run has taken over."""


@dataclass(frozen=True)
class AttemptStart:
    """What an attempt notes when it begins.

    Attributes:
        number: of the attempt, from 1.
        step: step of the checkpoint that it continues from; 0 for a new run.
        parent: the attempt that wrote that checkpoint; None: it is not one of this run.
        seen: number of lines in each event file of the earlier attempts at that time; later lines do not count.
    """

    number: int
    step: int = 0
    parent: int | None = None
    seen: Mapping[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"attempt": self.number, "step": self.step, "parent": self.parent, "seen": dict(self.seen)}

    @classmethod
    def from_json(cls, found: Any) -> AttemptStart:
        """The content of a start note.

        Raises:
            KeyError, TypeError, ValueError: it is not that of a start note.
        """
        note = cls(found["attempt"], found["step"], found["parent"], dict(found["seen"]))
        numbers = [note.number, note.step, *([] if note.parent is None else [note.parent]), *note.seen.values()]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a value is not a whole number")
        return note


@dataclass(frozen=True)
class Span:
    """The steps of one attempt that are the run's.

    Attributes:
        number: of the attempt.
        after: the last step before them.
        upto: the last of them; None: all that the attempt has written and will write.
    """

    number: int
    after: int
    upto: int | None

    def contains(self, step: int) -> bool:
        return self.after < step and (self.upto is None or step <= self.upto)


class Lineage:
    """The chain of attempts that leads to one of them.

    Args:
        starts: start notes of all attempts.
        head: the attempt at which the chain ends; None: the newest.
    """

    def __init__(self, starts: Iterable[AttemptStart], head: int | None = None) -> None:
        self._starts = {start.number: start for start in starts}
        newest = max(self._starts, default=None)
        self.spans = tuple(reversed(list(self._backwards(newest if head is None else head))))

    def _backwards(self, number: int | None) -> Iterator[Span]:
        upto: int | None = None
        while number is not None and (start := self._starts.get(number)) is not None:
            yield Span(number, start.step or -1, upto)  # a new run may save before its first step
            upto = start.step
            number = start.parent if start.parent is None or start.parent < number else None

    def includes(self, number: int, step: int) -> bool:
        """Whether what attempt `number` wrote for a step belongs to the run."""
        return any(span.number == number and span.contains(step) for span in self.spans)

    def counted_lines(self, file: str) -> int | None:
        """How many lines of an event file belong to the run; None: all, since no attempt has begun after its own."""
        return min((start.seen[file] for start in self._starts.values() if file in start.seen), default=None)


class Attempts:
    """All attempts of the run in a directory, which need not exist yet.

    Args:
        run: the run's directory.

    Attributes:
        left_out: what of the attempts' records could not be read.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / "attempts"
        self.left_out = LeftOut()
        self._read: dict[int, AttemptStart] = {}  # notes do not change once they are written

    def directory(self, number: int) -> Path:
        return self.path / f"{number:04d}"

    def numbers(self) -> list[int]:
        """All claimed numbers, ascending."""
        names = os.listdir(self.path) if self.path.is_dir() else []
        return sorted(int(name) for name in names if re.fullmatch(r"\d{4,}", name))

    def claim(self, after: int | None = None) -> int:
        """Takes the next number.

        Args:
            after: number of the attempt that goes on under another one, since its run is rewound; None: a new start.

        Raises:
            Superseded: a newer attempt than `after` has taken over the run. Asked in the claim itself, so that no other
                process can claim in between.
            UserError: the disk refuses a directory, or the directory holds a run whose attempts/ was removed.
        """
        try:
            self.refuse_orphans()
            self.path.mkdir(parents=True, exist_ok=True)
            if after is not None:
                try:
                    self.directory(after + 1).mkdir()
                except FileExistsError:
                    raise Superseded from None
                return after + 1
            while True:
                number = max(self.numbers(), default=0) + 1
                with contextlib.suppress(FileExistsError):
                    self.directory(number).mkdir()
                    return number
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}", "run.root=DIR elsewhere") from None

    def refuse_orphans(self) -> None:
        """Checkpoints and rows without the notes that say whose they are would be passed over and overwritten.

        Raises:
            UserError: the directory holds a run, but no attempts.
        """
        if self.numbers():
            return
        saved = self._saved()
        if not saved and not (self.run / "metrics.jsonl").exists():
            return
        if self.numbers():  # another process has claimed meanwhile, and what was found is its own
            return
        source = f" resume={saved[-1]}" if saved else ""
        raise UserError(
            f"{self.run} holds a run, but its attempts/ is missing, without which no row or checkpoint counts",
            f"put attempts/ back, or start a new run: run.name=NEW{source}",
        )

    def _saved(self) -> list[Path]:
        return sorted(self.run.glob("checkpoints/step_*"))

    def begin(self, number: int, step: int, parent: int | None) -> None:
        """Writes the start note of an attempt; must precede everything else that it writes.

        Args:
            number: of the attempt.
            step: step of the checkpoint that it continues from; 0: none.
            parent: the attempt that wrote that checkpoint; None: it is not one of this run.

        Raises:
            UserError: the disk refuses it.
        """
        files = (f"{earlier:04d}/{file}" for earlier in self.numbers() if earlier < number for file in EVENT_FILES)
        lines = {name: self._lines(name) for name in files}
        seen = {name: len(found) for name, found in lines.items() if found is not None}
        note = AttemptStart(number, step, parent, seen).as_json()
        path = self.directory(number) / _NOTE
        try:
            text = json.dumps({**note, "time": time.time(), "host": platform.node(), "pid": os.getpid()})
            write_durably(path, text)
            for directory in (self.path, self.run):  # a checkpoint that outlives the note would not count
                sync_directory(directory)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}", "make room, or run.root=DIR elsewhere"
            ) from None

    def starts(self, head: int | None = None) -> list[AttemptStart]:
        """Start notes of the attempts up to `head`, None: of all.

        An attempt that was claimed but has no note has written nothing that counts.

        Raises:
            UserError: a note is there and cannot be read; without it a part of the run would not count.
        """
        numbers = [number for number in self.numbers() if head is None or number <= head]
        return [start for number in numbers if (start := self._start(number)) is not None]

    def _start(self, number: int) -> AttemptStart | None:
        path = self.directory(number) / _NOTE
        if number not in self._read:
            try:
                start = AttemptStart.from_json(load_object(path))
                if start.number != number:
                    raise ValueError(f"it is that of attempt {start.number}")
            except FileNotFoundError:
                return None
            except (OSError, ValueError, KeyError, TypeError) as error:
                saved = self._saved()
                source = f" resume={saved[-1]}" if saved else ""
                reason = (error.strerror if isinstance(error, OSError) else None) or repr(error)
                raise UserError(
                    f"{path} cannot be read ({reason:.200}): it says which rows and checkpoints of attempt {number} "
                    "count",
                    f"restore the file from a copy, or start a new run: run.name=NEW{source}",
                ) from None
            self._read[number] = start
        return self._read[number]

    def lineage(self, head: int | None = None) -> Lineage:
        """The chain to attempt `head`, as it was when that began; None: to the newest attempt."""
        return Lineage(self.starts(head), head)

    def superseded(self, number: int) -> bool:
        """Whether a newer attempt than this one has been claimed."""
        return max(self.numbers(), default=0) > number

    def metrics(self, head: int | None = None) -> Iterator[Record]:
        """The run's rows: each step once, from the attempt that it belongs to."""
        for span in self.lineage(head).spans:
            name = f"{span.number:04d}/metrics.jsonl"
            for record in records_in(self._lines(name) or (), metrics_row, f"attempts/{name}", self.left_out):
                if span.contains(record.row["step"]):
                    yield record

    def metrics_after(self, step: int, lineage: Lineage) -> Iterator[Record]:
        """The run's rows of later steps than this one, as seen from the end of a chain."""
        for span in lineage.spans:
            if span.upto is None or span.upto > step:
                with self._rows_of(span) as (file, begin, end):
                    begin = max(begin, end_of_steps(file, end, step))
                    yield from rows_between(file, begin, end)

    def last_metrics(self, lineage: Lineage) -> Record | None:
        """The run's last row, as seen from the end of a chain; None: there is none."""
        for span in reversed(lineage.spans):
            with self._rows_of(span) as (file, begin, end):
                if begin < end and (record := last_row_before(file, end)) is not None:
                    return record
        return None

    def copy_metrics(self, target: BinaryIO, head: int | None = None) -> None:
        """Writes the lines of `metrics` to an unbuffered file, as they are; see `copy_rows` for damaged ones.

        Raises:
            OSError: a file cannot be read, or the disk refused.
        """
        for span in self.lineage(head).spans:
            name = f"attempts/{span.number:04d}/metrics.jsonl"
            with self._rows_of(span) as (file, begin, end):
                self.left_out.lines.pop(name, None)
                if lines := copy_rows(file, begin, end, target):
                    self.left_out.lines[name] = lines

    @contextmanager
    def _rows_of(self, span: Span) -> Iterator[tuple[BinaryIO, int, int]]:
        """The metrics.jsonl of an attempt, and between which offsets the rows of a span are."""
        path, file = self.directory(span.number) / "metrics.jsonl", f"attempts/{span.number:04d}/metrics.jsonl"
        self.left_out.files.pop(file, None)
        try:
            opened: BinaryIO = open_regular(path)
        except (OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError):
                self.left_out.files[file] = reason_of(error)
            opened = BytesIO()
        with opened:
            size = complete_size(opened)
            begin = end_of_steps(opened, size, span.after)
            yield opened, begin, size if span.upto is None else end_of_steps(opened, size, span.upto)

    def events(self, head: int | None = None) -> Iterator[Record]:
        """The run's events: attempt by attempt, each sorted by time."""
        lineage = self.lineage(head)
        for number in self.numbers():
            if head is not None and number > head:
                break
            records: list[Record] = []
            for file in EVENT_FILES:
                name = f"{number:04d}/{file}"
                counted = (self._lines(name) or [])[: lineage.counted_lines(name)]
                records += records_in(counted, event_row, f"attempts/{name}", self.left_out)
            yield from sorted(records, key=lambda record: float(record.row["time"]))

    def _lines(self, name: str) -> list[bytes] | None:
        """The complete lines of a file of an attempt, NUMBER/FILE; None: it cannot be read."""
        return complete_lines(self.path / name, f"attempts/{name}", self.left_out)
