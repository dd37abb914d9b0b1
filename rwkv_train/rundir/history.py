"""What happened to a run over all its starts, read from its records: how each ended, what was lost, where time went."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.rundir.jsonl import JsonLines

STARTS = ("started", "resumed")
PLANNED = (  # ends that are no failures
    "finished",
    "stopped",
    "interrupted",
    "preempted",
    "requeued",
    "requeue_failed",
    "unhealthy",
)
TRIES = 3  # failures at one step after which a run stops

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """One start of a run and what became of it.

    Attributes:
        events: its own, the first of them started or resumed.
        after: how the start before had ended.
        reached: the last step of the run when this start began; it may have been thrown away.
    """

    events: Sequence[Row]
    after: str | None
    reached: int

    @property
    def ended(self) -> str:
        """How; "killed" where it did not say so."""
        told = [row["event"] for row in self.events if row["event"] in (*PLANNED, "failed", "given_up")]
        return str(told[-1]) if told else "killed"


@dataclass(frozen=True)
class Account:
    """Where the time of a run went, in seconds.

    Attributes:
        wall: from its first start to its last sign of life.
        productive: in the steps that it consists of.
        lost: the rest, by cause.
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
        events: of all starts, in their order.
        rows: of metrics.jsonl, each step once.
        alive: when something was written last, in seconds since 1970; counts where the last start has not told its end.
    """

    def __init__(self, events: Sequence[Row], rows: Sequence[Row], alive: float = 0.0) -> None:
        self.events, self.rows = events, rows
        firsts = [number for number, row in enumerate(events) if row["event"] in STARTS]
        bounds = zip(firsts, [*firsts[1:], len(events)], strict=False)
        self.starts = [
            Start(
                events[first:end], events[first].get("after"), int(events[first].get("reached", events[first]["step"]))
            )
            for first, end in bounds
        ]
        told = [float(row["time"]) for row in events]
        self.alive = max([*told, *([alive] if self.starts and self.starts[-1].ended == "killed" else [])], default=0.0)

    @classmethod
    def read(cls, run: RunDirectory) -> History:
        """Of a run directory, which need not exist; what a watchdog wrote last is not yet in the merge, and counts."""
        files = [path for path in (run.events, run.metrics) if path.exists()]
        alive = max((path.stat().st_mtime for path in files), default=0.0)
        starts = run.attempts
        if not starts.numbers():  # from before there were attempts
            return cls(JsonLines(run.events).rows(), JsonLines(run.metrics).rows(), alive)
        return cls(list(map(json.loads, starts.events())), list(map(json.loads, starts.metrics())), alive)

    @property
    def reached(self) -> int:
        """The last step that was done, whether or not a checkpoint has it."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    def next_start(self, step: int) -> dict[str, Any]:
        """What the event of a start behind a step tells: how long it took to get there, and of the start before."""
        starting = round(time.time() - psutil.Process().create_time(), 3)
        if not self.starts:
            return {"seconds_starting": starting}
        thrown_away = [row for row in self.rows if row["step"] > step]
        return {
            "after": self.starts[-1].ended,
            "reached": self.reached,
            "steps_lost": len(thrown_away),
            "seconds_lost": round(sum(float(row["seconds"]) for row in thrown_away), 3),
            "seconds_down": round(max(0.0, time.time() - starting - self.alive), 3),
            "seconds_starting": starting,
        }

    def failures(self) -> int:
        """How many starts in a row have failed at the step that was reached last; a given-up run counts anew."""
        count, ended, reached = 0, self.starts[-1].ended if self.starts else "finished", self.reached
        for start in reversed(self.starts):
            if ended in (*PLANNED, "given_up"):
                break
            count += 1
            if start.after is None or start.reached != reached:
                break
            ended = start.after
        return count

    def last_words(self) -> str:
        """The reason of the newest failure that gave one."""
        told = [str(row["reason"]) for row in self.events if row["event"] == "failed" and "reason" in row]
        return told[-1] if told else "it was killed from outside, or its node was lost"

    def account(self) -> Account:
        """Goodput: what part of the time went into steps that count, and what the rest went into."""
        if not self.starts:
            return Account(0.0, 0.0)
        wall = self.alive - float(self.events[0]["time"]) + float(self.events[0].get("seconds_starting", 0.0))
        lost = dict.fromkeys(("down", "steps done again", "starting", "checkpoints"), 0.0)
        for start in self.starts:
            first = start.events[0]
            lost["down"] += float(first.get("seconds_down", 0.0))
            lost["steps done again"] += float(first.get("seconds_lost", 0.0))
            lost["starting"] += float(first.get("seconds_starting", 0.0))
            lost["checkpoints"] += sum(float(row.get("pause", 0.0)) for row in start.events)
        productive = sum(float(row["seconds"]) for row in self.rows)
        lost["loading, validation and the rest"] = max(0.0, wall - productive - sum(lost.values()))
        return Account(wall, productive, lost)
