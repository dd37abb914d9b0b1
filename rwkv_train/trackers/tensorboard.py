"""TensorBoard: event files with the keys of metrics.jsonl."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rwkv_train.rundir.durable import write_state
from rwkv_train.rundir.jsonl import EventRow, MetricsRow
from rwkv_train.trackers import REPORTED_EVENTS, LocalTracker, TrackedRun, flat, read_state, text_of

FLUSH_INTERVAL = 30.0  # seconds
MAX_QUEUED_EVENTS = 10_000  # for the writer's thread; beyond that training would wait for a disk that does not respond


class TensorBoard(LocalTracker):
    """`tensorboard --logdir runs` shows the run.

    Each process writes an event file of its own. It starts with a mark that voids the steps of older files which the
    run repeats (`purge_step`). The last step that is certainly on the disk is noted in trackers/tensorboard.json; what
    a kill has lost after it is written again from metrics.jsonl.

    Args:
        directory: where the event files are written; null: tensorboard/ of the run directory.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self._writer: Any = None
        self._flushed_at = 0.0
        self._last = 0

    def open(self, run: TrackedRun, step: int, rows: Callable[[], Sequence[MetricsRow]]) -> None:
        self._directory = Path(self.directory) if self.directory else run.path / "tensorboard"
        self._note = run.path / "trackers" / "tensorboard.json"
        self._start(step)
        for row in rows() if self._last < step else ():
            if self._last < row["step"] <= step:
                self.row(row)

    def _start(self, step: int) -> None:
        """Begins a new event file after a step, or after an earlier one if later rows may be lost."""
        from torch.utils.tensorboard.writer import SummaryWriter

        try:
            sent = int(read_state(self._note).get("sent", 0))
        except ValueError as error:
            print(f"\nWARNING: {error}; all rows are written again", file=sys.stderr)
            sent = 0
        self._last = min(step, sent)
        write_state(self._note, {"sent": self._last})
        self._writer = SummaryWriter(str(self._directory), purge_step=self._last + 1, max_queue=MAX_QUEUED_EVENTS)
        self._flushed_at = time.monotonic()

    def row(self, row: MetricsRow) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [(key, value) for key, value in flat(row) if key not in ("step", "time")]
        summary = Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in values])
        self._writer.file_writer.add_summary(summary, row["step"], row.get("time"))  # one event for the complete row
        self._last = row["step"]
        if time.monotonic() - self._flushed_at > FLUSH_INTERVAL:
            self._flush()

    def event(self, event: EventRow) -> None:
        if event["event"] in REPORTED_EVENTS:
            self._writer.add_text("events", text_of(event), event["step"], event["time"])
        if event["event"] == "rewound":
            self._flush()
            self._writer.close()
            self._start(event["step"])

    def _flush(self) -> None:
        self._writer.flush()
        write_state(self._note, {"sent": self._last}, sync=False)  # training would wait for the disk
        self._flushed_at = time.monotonic()

    def close(self, rows: Callable[[], Sequence[MetricsRow]]) -> None:
        self._flush()
        self._writer.close()
