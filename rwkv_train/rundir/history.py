"""The history of a run over all its attempts, read from its records: how each ended, what was lost, where time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.rundir.jsonl import EventRow, MetricsRow

START_EVENTS = ("started", "resumed")
PLANNED_ENDS = (  # events that end an attempt without a failure
    "finished",
    "stopped",
    "interrupted",
    "preempted",
    "requeued",
    "requeue_failed",
    "unhealthy",
)
MAX_FAILURES = 3  # consecutive failures at one step after which a run stops


@dataclass(frozen=True)
class AttemptRecord:
    """The events of one attempt.

    Attributes:
        events: in order; the first is "started" or "resumed".
        after: how the previous attempt had ended; None: there is none.
        reached: the last step of the run when this attempt began; it may be after the checkpoint that it resumed from.
    """

    events: Sequence[EventRow]
    after: str | None
    reached: int

    @property
    def ended(self) -> str:
        """How the attempt ended; "killed" if it recorded no end."""
        ends = [row["event"] for row in self.events if row["event"] in (*PLANNED_ENDS, "failed", "given_up")]
        return str(ends[-1]) if ends else "killed"


@dataclass(frozen=True)
class TimeAccount:
    """Where the time of a run went, in seconds.

    Attributes:
        wall: time from the first start to the last record.
        productive: time in steps that are part of the run.
        lost: the remaining time by cause.
    """

    wall: float
    productive: float
    lost: Mapping[str, float] = field(default_factory=dict)

    @property
    def goodput(self) -> float:
        return self.productive / self.wall if self.wall > 0 else 0.0


class History:
    """The records of a run directory as they are now.

    Args:
        events: events of all attempts, in order.
        rows: rows of metrics.jsonl, each step once.
        alive: when a record was last written, in Unix seconds; used if the last attempt has recorded no end.

        notes: what of the records could not be read, a sentence for each file.

    Attributes:
        attempts: the events of each attempt.
    """

    def __init__(
        self,
        events: Sequence[EventRow],
        rows: Sequence[MetricsRow],
        alive: float = 0.0,
        notes: Sequence[str] = (),
    ) -> None:
        self.events, self.rows, self.notes = events, rows, notes
        firsts = [number for number, row in enumerate(events) if row["event"] in START_EVENTS]
        bounds = zip(firsts, [*firsts[1:], len(events)], strict=False)
        self.attempts = [
            AttemptRecord(
                events[first:end], events[first].get("after"), int(events[first].get("reached", events[first]["step"]))
            )
            for first, end in bounds
        ]
        times = [float(row["time"]) for row in events]
        if self.attempts and self.attempts[-1].ended == "killed":
            times.append(alive)
        self.alive = max(times, default=0.0)

    @classmethod
    def read(cls, run: RunDirectory) -> History:
        """Reads a run directory, which need not exist.

        The attempts' own files are read: the merged view lacks what a watchdog wrote last.
        """
        attempts = run.attempts
        events, rows = ([record.row for record in records] for records in (attempts.events(), attempts.metrics()))
        return cls(events, rows, _written(run), attempts.left_out.texts())

    @property
    def last(self) -> MetricsRow | None:
        """The last row; None: there is none."""
        return self.rows[-1] if self.rows else None

    @property
    def reached(self) -> int:
        """The last step that was done, whether or not a checkpoint includes it."""
        return int(self.last["step"]) if self.last else 0

    def rows_after(self, step: int) -> Iterator[MetricsRow]:
        """The rows of later steps than this one."""
        return (row for row in self.rows if row["step"] > step)

    def next_start(self, step: int) -> dict[str, Any]:
        """Details of the event of an attempt that starts at `step`: its start-up time, and what came before it."""
        starting = round(max(0.0, time.time() - psutil.Process().create_time()), 3)  # the clock may have been set back
        if not self.attempts:
            return {"seconds_starting": starting}
        steps, seconds = 0, 0.0
        for row in self.rows_after(step):
            steps, seconds = steps + 1, seconds + _sum([row], "seconds")
        return {
            "after": self.attempts[-1].ended,
            "reached": self.reached,
            "steps_lost": steps,
            "seconds_lost": round(seconds, 3),
            "seconds_down": round(max(0.0, time.time() - starting - self.alive), 3),
            "seconds_starting": starting,
        }

    def failures(self) -> int:
        """How many consecutive attempts have failed at the step reached last; after a given-up run it counts from 0."""
        count, ended, reached = 0, self.attempts[-1].ended if self.attempts else "finished", self.reached
        for attempt in reversed(self.attempts):
            if ended in (*PLANNED_ENDS, "given_up"):
                break
            count += 1
            if attempt.after is None or attempt.reached != reached:
                break
            ended = attempt.after
        return count

    def last_failure(self) -> str:
        """The reason of the last failure that recorded one."""
        reasons = [str(row["reason"]) for row in self.events if row["event"] == "failed" and "reason" in row]
        return reasons[-1] if reasons else "it was killed from outside, or its node was lost"

    def account(self) -> TimeAccount:
        """How much of the time went into steps that are part of the run, and what the rest went into.

        The parts are measured each by itself. Where the clock was set back between two attempts, the run's first and
        last time are too close to each other, and the parts together are the time that it took at least.
        """
        if not self.attempts:
            return TimeAccount(0.0, 0.0)
        firsts = [attempt.events[0] for attempt in self.attempts]
        lost = {
            "down": _sum(firsts, "seconds_down"),
            "steps done again": _sum(firsts, "seconds_lost"),
            "starting": _sum(firsts, "seconds_starting"),
            "checkpoints": sum(_sum(attempt.events, "pause") for attempt in self.attempts),
        }
        productive = _sum(self.rows, "seconds")
        between = self.alive - float(self.events[0]["time"]) + _sum(firsts[:1], "seconds_starting")
        wall = max(between, productive + sum(lost.values()))
        lost["loading, validation and the rest"] = wall - productive - sum(lost.values())
        return TimeAccount(wall, productive, lost)


class StartHistory(History):
    """What a start needs of the records: the last row, and those that are repeated. Rows are not kept.

    Args:
        run: the directory, as it is before the attempt has begun.
    """

    def __init__(self, run: RunDirectory) -> None:
        attempts = self._attempts = run.attempts
        events, self._lineage = [record.row for record in attempts.events()], attempts.lineage()
        last = attempts.last_metrics(self._lineage)
        self._last = None if last is None else last.row
        super().__init__(events, [], _written(run), attempts.left_out.texts())

    @property
    def last(self) -> MetricsRow | None:
        return self._last

    def rows_after(self, step: int) -> Iterator[MetricsRow]:
        return (record.row for record in self._attempts.metrics_after(step, self._lineage))


def _written(run: RunDirectory) -> float:
    """When a record was last written, in Unix seconds; 0: never."""
    files = [path for path in (run.events, run.metrics) if path.exists()]
    return max((path.stat().st_mtime for path in files), default=0.0)


def _sum(rows: Sequence[EventRow], key: str) -> float:
    """Seconds in all rows that have them; negative ones were measured with a clock that was set back."""
    return sum(max(0.0, float(row.get(key, 0.0))) for row in rows)
