"""The starts of a run on the disk: `attempts/0003/` is the third one's, and nobody else writes in it.

    attempts/0003/
        start.json        what it goes on from, written before its first row
        metrics.jsonl     its rows
        events.jsonl      its events; watchdog.jsonl, its watchdog's
        stacks_rank_0001.txt …

A number is claimed by making its directory, which one process alone can do, on NFS as well. Then, and not before, the
claimer looks for a checkpoint to go on from: an older attempt that saves once more either has its checkpoint seen,
or sees that a newer one has begun, and deletes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_train.errors import UserError
from rwkv_train.rundir.lineage import Lineage, Start

EVENTS = ("events.jsonl", "watchdog.jsonl")  # of one attempt: the run's own, the watchdog's
_NOTE = "start.json"


class Attempts:
    """All starts of the run in a directory; reading needs none of them to be there."""

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / "attempts"

    def directory(self, number: int) -> Path:
        return self.path / f"{number:04d}"

    def numbers(self) -> list[int]:
        """All that were claimed, oldest first."""
        names = os.listdir(self.path) if self.path.is_dir() else []
        return sorted(int(name) for name in names if re.fullmatch(r"\d{4,}", name))

    def claim(self) -> int:
        """Takes the next number.

        Raises:
            UserError: the disk refuses a directory.
        """
        try:
            self._adopt()
            self.path.mkdir(parents=True, exist_ok=True)
            while True:
                number = max(self.numbers(), default=0) + 1
                with contextlib.suppress(FileExistsError):
                    self.directory(number).mkdir()
                    return number
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}", "run.root=DIR elsewhere") from None

    def begin(self, number: int, step: int, parent: int | None) -> None:
        """Notes what an attempt goes on from; must precede everything else that it writes."""
        files = (f"{earlier:04d}/{file}" for earlier in self.numbers() if earlier < number for file in EVENTS)
        seen = {name: len(_lines(self.path / name)) for name in files}
        note = Start(number, step, parent, seen).as_json()
        aside = self.directory(number) / f".{_NOTE}"
        aside.write_text(json.dumps({**note, "time": time.time(), "host": platform.node(), "pid": os.getpid()}))
        aside.replace(self.directory(number) / _NOTE)

    def starts(self) -> list[Start]:
        """Of those that have begun; one that was claimed and noted nothing has written nothing that counts."""
        found = []
        for number in self.numbers():
            with contextlib.suppress(OSError, ValueError, KeyError):
                found.append(Start.from_json(json.loads((self.directory(number) / _NOTE).read_text())))
        return found

    def lineage(self, head: int | None = None) -> Lineage:
        """The chain to an attempt, of those that had begun before it; None: to the newest that has begun."""
        starts = self.starts()
        return Lineage([start for start in starts if head is None or start.number <= head], head)

    def superseded(self, number: int) -> bool:
        """Whether a newer attempt has been claimed."""
        return max(self.numbers(), default=0) > number

    def metrics(self, head: int | None = None) -> Iterator[bytes]:
        """The run's rows: each step once, by the attempt whose it is."""
        for span in self.lineage(head).spans:
            for line in _lines(self.directory(span.number) / "metrics.jsonl"):
                if span.holds(json.loads(line)["step"]):
                    yield line

    def events(self, head: int | None = None) -> Iterator[bytes]:
        """What happened to the run, attempt by attempt, each in the order of time."""
        lineage = self.lineage(head)
        for number in self.numbers():
            if head is not None and number > head:
                break
            lines: list[bytes] = []
            for file in EVENTS:
                name = f"{number:04d}/{file}"
                lines += _lines(self.path / name)[: lineage.lines(name)]
            yield from sorted(lines, key=_time)

    def _adopt(self) -> None:
        """Notes an attempt for a run whose directory is from before there were notes, or came without them."""
        old = [self.run / name for name in ("metrics.jsonl", "events.jsonl") if (self.run / name).exists()]
        names = (re.fullmatch(r"step_(\d+)(?:-(\d+))?", path.name) for path in self.run.glob("checkpoints/step_*"))
        saved = [(int(name[1]), int(name[2] or 0)) for name in names if name]
        if not (old or saved) or self.numbers():  # looked up in this order: else they might be those of a new start
            return
        number = max(saved, default=(0, 0))[1]  # whose the newest is: all that is there becomes that one's
        self.path.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".adopted-", dir=self.path))
        for path in old:
            shutil.copyfile(path, aside / path.name)
        (aside / _NOTE).write_text(json.dumps(Start(number).as_json()))
        try:
            aside.rename(self.directory(number))
        except OSError:  # somebody else was faster
            shutil.rmtree(aside)


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file; a last one that a kill left torn is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def _time(line: bytes) -> Any:
    return json.loads(line).get("time", 0)
