"""Lightning's loggers (MLFlowLogger and others) as trackers: they get the rows of metrics.jsonl under the same keys."""

from __future__ import annotations

from typing import Any

from rwkv_train.rundir.jsonl import EventRow, MetricsRow
from rwkv_train.trackers import TrackedRun, Tracker, flat


class LightningTracker(Tracker):
    """Hands rows to a logger of Lightning.

    Args:
        logger: one that Lightning's Trainer accepts.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.state: dict[str, Any] = {}
        self._last = 0

    def begin(self, run: TrackedRun, step: int) -> int:
        self.logger.log_hyperparams(dict(run.info.get("config", {})))
        return self.back(step)

    def back(self, step: int) -> int:
        return min(step, int(self.state.get("sent", 0)))

    def row(self, row: MetricsRow) -> None:
        self._last = row["step"]
        self.logger.log_metrics({key: value for key, value in flat(row) if key != "step"}, step=self._last)

    def event(self, event: EventRow) -> None:
        """Ignored: Lightning's loggers have no events."""

    def flush(self) -> None:
        self.logger.save()
        self.state["sent"] = self.state["reached"] = self._last

    def end(self) -> None:
        self.logger.finalize("success")
