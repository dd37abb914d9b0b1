"""Trackers: W&B, TensorBoard, a table, Lightning's loggers. Each is a copy of metrics.jsonl, and none may cost a run.

A tracker lives in a process of its own that reads metrics.jsonl as it grows. The file is the queue between the two: the
training writes a row as it would without trackers, and one that is slow, out of reach, out of disk, hanging or killed
is not noticed there. What it has not got, it gets later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from rwkv_train.models.registry import layer_charts

Row = Mapping[str, Any]
TOLD = ("bad_step", "rewound", "alert", "checkpoint_failed", "unhealthy")  # events that somebody should see


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run."""

    path: Path
    name: str
    info: Mapping[str, Any] = field(default_factory=dict)  # config, versions, data, hardware, plan
    changed: bool = False  # whether the run goes on with another config or code than its checkpoint was made with


class Tracker(ABC):
    """One copy of a run. All methods are called in the tracker's own process; an exception means: try again later.

    Attributes:
        state: plain values that are kept in the run directory for the next process; `sent` is the last step that is
            there for sure, `reached` the last one that was handed over.
    """

    state: dict[str, Any]

    @abstractmethod
    def begin(self, run: Run, step: int) -> int:
        """Opens the copy of a run that goes on from a step.

        Returns:
            the step behind which rows are wanted, at most `step`: older ones again where they may be lost.
        """

    @abstractmethod
    def row(self, row: Row) -> None:
        """Takes a row of metrics.jsonl; they come in the order of their steps."""

    @abstractmethod
    def back(self, step: int) -> int:
        """The run was rewound: what it has told behind that step does not count any more. Returns as `begin` does."""

    @abstractmethod
    def event(self, event: Row) -> None:
        """Takes a row of events.jsonl."""

    @abstractmethod
    def flush(self) -> None:
        """Puts what was taken where a kill does not reach it, and notes it in `state` where it can."""

    @abstractmethod
    def end(self) -> None:
        """Closes it; all rows have come."""


def flat(row: Row) -> Iterator[tuple[str, float]]:
    """The numbers of a row, by a key each: KEY/00 of a layer, KEY/00/median of its half-lives; no nulls."""
    names_of = layer_charts()
    for key, value in row.items():
        if isinstance(value, list):
            for layer, one in enumerate(value):
                if isinstance(one, list):
                    named = zip(names_of[key].quantiles if key in names_of else count(), one, strict=False)
                    yield from ((f"{key}/{layer:02}/{name}", part) for name, part in named if part is not None)
                elif one is not None:
                    yield f"{key}/{layer:02}", one
        elif value is not None:
            yield key, value


def text_of(event: Row) -> str:
    """What an event says, for people."""
    details = ", ".join(
        f"{k}: {v}" for k, v in event.items() if k not in ("time", "event", "step", "text") and v is not None
    )
    return f"{event.get('text') or event['event']} (step {event['step']}{', ' if details else ''}{details})"
