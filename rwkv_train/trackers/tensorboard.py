"""TensorBoard: event files with the keys of metrics.jsonl, written without torch."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rwkv_train.trackers import TOLD, Row, Run, Tracker, flat, text_of


class TensorBoard(Tracker):
    """`tensorboard --logdir runs` shows them.

    A process that goes on writes a file of its own that begins with the mark "from this step on, what older files say
    does not count" (a session log), which TensorBoard heeds.

    Args:
        directory: where the event files lie; null: tensorboard/ of the run directory.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self.state: dict[str, Any] = {}
        self._file: Any = None
        self._last = 0

    def begin(self, run: Run, step: int) -> int:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Any = event_pb2
        folder = Path(self.directory) if self.directory else run.path / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{os.uname().nodename}.{os.getpid()}"
        self._file = RecordWriter(open(folder / name, "wb"))  # noqa: SIM115  closed by `end`
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        return self.back(step)

    def back(self, step: int) -> int:
        step = min(step, self.state.get("sent", 0))
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(self._event.Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._last = step
        self.flush()
        return step

    def row(self, row: Row) -> None:
        event = self._event.Event(wall_time=row.get("time") or time.time(), step=row["step"])
        for key, value in flat(row):
            if key not in ("step", "time"):
                event.summary.value.add(tag=key, simple_value=value)
        self._write(event)
        self._last = row["step"]

    def event(self, event: Row) -> None:
        if event["event"] not in TOLD:
            return
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto

        told = self._event.Event(wall_time=event["time"], step=event["step"])
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        text = TensorProto(dtype="DT_STRING", string_val=[text_of(event).encode()])
        told.summary.value.add(tag="events", metadata=metadata, tensor=text)
        self._write(told)

    def _write(self, event: Any) -> None:
        self._file.write(event.SerializeToString())

    def flush(self) -> None:
        self._file.flush()
        self.state["sent"] = self.state["reached"] = self._last

    def end(self) -> None:
        self._file.close()
