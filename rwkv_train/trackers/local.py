"""Local trackers in the training process: an error of one costs a warning and that tracker, not the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rwkv_train.rundir.jsonl import EventRow, JsonLines, MetricsRow
from rwkv_train.trackers import LocalTracker, TrackedRun


class LocalTrackers:
    """Calls local trackers, and gives up one that raises.

    Args:
        trackers: entry of `logger` → tracker.
        run: the run.
        step: the step that it continues from; 0 for a new run.
        metrics: path of metrics.jsonl.
    """

    def __init__(self, trackers: Mapping[str, LocalTracker], run: TrackedRun, step: int, metrics: Path) -> None:
        self._trackers, self._run, self._metrics = dict(trackers), run, metrics
        self._call(lambda tracker: tracker.open(run, step, self._rows))

    def _rows(self) -> list[dict[str, Any]]:
        return JsonLines(self._metrics).rows()

    def row(self, row: MetricsRow) -> None:
        self._call(lambda tracker: tracker.row(row))

    def event(self, event: EventRow) -> None:
        self._call(lambda tracker: tracker.event(event))

    def close(self) -> None:
        self._call(lambda tracker: tracker.close(self._rows))
        self._trackers.clear()

    def _call(self, method: Callable[[LocalTracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                method(tracker)
            except Exception as error:  # code of other packages: whatever it raises, training continues
                del self._trackers[name]
                message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                print(
                    f"\nlogger={name}: {message}; training continues without it\n"
                    f"  later: rwkv-train report {self._run.path} --push {name}",
                    file=sys.stderr,
                    flush=True,
                )
