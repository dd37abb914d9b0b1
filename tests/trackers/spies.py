"""Trackers that behave badly; runs name them as `logger.….`. Imports little: each starts in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from rwkv_train.rundir.jsonl import EventRow, MetricsRow
from rwkv_train.trackers import LocalTracker, TrackedRun, Tracker


class Memory(Tracker):
    """Keeps rows and events in memory; raises as often as asked."""

    def __init__(self, failures: int = 0) -> None:
        self.state: dict[str, Any] = {}
        self.rows: dict[int, MetricsRow] = {}
        self.events: list[EventRow] = []
        self.failures, self.ended = failures, False

    def begin(self, run: TrackedRun, step: int) -> int:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no answer")
        return self.back(step)

    def back(self, step: int) -> int:
        self.rows = {s: row for s, row in self.rows.items() if s <= step}
        sent: int = self.state.get("sent", 0)
        return min(step, sent)

    def row(self, row: MetricsRow) -> None:
        self.rows[row["step"]] = row

    def event(self, event: EventRow) -> None:
        self.events.append(event)

    def flush(self) -> None:
        self.state["sent"] = max(self.rows, default=0)

    def end(self) -> None:
        self.ended = True


class Hanging(Memory):
    def row(self, row: MetricsRow) -> None:
        time.sleep(10_000)


class Failing(Memory):
    def row(self, row: MetricsRow) -> None:
        raise OSError(28, "No space left on device")


class Keyed(LocalTracker):
    """Notes the key that it was made with, and what it knows of the run."""

    made: ClassVar[list[tuple[str, TrackedRun]]] = []

    def __init__(self, key: str) -> None:
        self.key = key

    def open(self, run: TrackedRun, step: int, rows: Callable[[], Sequence[MetricsRow]]) -> None:
        Keyed.made.append((self.key, run))
