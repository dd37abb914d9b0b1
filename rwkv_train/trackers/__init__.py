"""Trackers: W&B, TensorBoard, a CSV table, Lightning's loggers: copies of metrics.jsonl that cannot fail a run.

A tracker of a service (`Tracker`) runs in a process of its own that reads metrics.jsonl as it grows. The file is the
queue: training writes a row as it would without trackers, and is not affected by a tracker that is slow, unreachable,
hanging or killed; that tracker gets its rows later. A tracker that only writes local files (`LocalTracker`) is called
by the training process; an error of it costs a warning.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from rwkv_train.json_files import load_object, reason_of
from rwkv_train.models.registry import layer_charts
from rwkv_train.rundir.jsonl import EventRow, MetricsRow

REPORTED_EVENTS = ("bad_step", "rewound", "checkpoint_failed", "unhealthy")  # shown as text or alerts


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of a run.

    Attributes:
        path: the run's directory.
        name: the run's name.
        info: configuration, versions, data, hardware, plan.
        changed: whether the run continues with another configuration or code than its checkpoint was made with.
    """

    path: Path
    name: str
    info: Mapping[str, Any] = field(default_factory=dict)
    changed: bool = False


class Tracker(ABC):
    """A tracker in a process of its own. If a method raises, the process tries again later.

    Attributes:
        state: plain values that are kept in the run directory for the next process: `sent` is the last step that the
            tracker certainly has, `reached` the last one that was handed over.
    """

    state: dict[str, Any]

    @abstractmethod
    def begin(self, run: TrackedRun, step: int) -> int:
        """Opens the copy of a run that continues from a step.

        Returns:
            the step after which rows are wanted, at most `step`: earlier ones again if they may be lost.
        """

    @abstractmethod
    def row(self, row: MetricsRow) -> None:
        """Takes a row of metrics.jsonl; rows come in the order of their steps."""

    @abstractmethod
    def back(self, step: int) -> int:
        """The run was rewound to a step: later rows do not count any more. Returns as `begin` does."""

    @abstractmethod
    def event(self, event: EventRow) -> None:
        """Takes a row of events.jsonl."""

    @abstractmethod
    def flush(self) -> None:
        """Stores the rows so that a kill does not lose them, and notes that in `state` if it can."""

    @abstractmethod
    def end(self) -> None:
        """Closes the copy; all rows have come."""


class LocalTracker:
    """A tracker that writes local files from the training process; by default it ignores everything."""

    def open(self, run: TrackedRun, step: int, rows: Callable[[], Sequence[MetricsRow]]) -> None:
        """Opens the copy of a run that continues from a step.

        Args:
            run: the run.
            step: 0 for a new run.
            rows: reads the rows of metrics.jsonl so far.
        """

    def row(self, row: MetricsRow) -> None:
        """Takes a row of metrics.jsonl; rows come in the order of their steps."""

    def event(self, event: EventRow) -> None:
        """Takes a row of events.jsonl; after "rewound", steps come again from the one after its `step`."""

    def close(self, rows: Callable[[], Sequence[MetricsRow]]) -> None:
        """Closes the copy; `rows` reads all rows of metrics.jsonl."""


def flat(row: MetricsRow) -> Iterator[tuple[str, float]]:
    """The numbers of a row, each under its own key: KEY/00 per layer, KEY/00/median for quantiles; no nulls."""
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


def read_state(path: Path) -> dict[str, Any]:
    """A tracker's state in the run directory; empty where there is none.

    Raises:
        ValueError: the file cannot be read, or its values are not those of a state.
    """
    try:
        state = load_object(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {reason_of(error)}") from None
    for key in ("sent", "reached"):
        if key in state and (type(state[key]) is not int or state[key] < 0):
            raise ValueError(f"{path} cannot be read: {key} is not a step")
    if "id" in state and not (isinstance(state["id"], str) and re.fullmatch(r"[A-Za-z0-9]+(-\d{1,9})?", state["id"])):
        raise ValueError(f"{path} cannot be read: id is not that of a run")
    if not (isinstance(state.get("path", ""), str) and type(state.get("inode", 0)) is int):
        raise ValueError(f"{path} cannot be read: path and inode are not those of a directory")
    return state


def text_of(event: EventRow) -> str:
    """An event as a line of text."""
    details = ", ".join(
        f"{k}: {v}" for k, v in event.items() if k not in ("time", "event", "step", "text") and v is not None
    )
    return f"{event.get('text') or event['event']} (step {event['step']}{', ' if details else ''}{details})"
