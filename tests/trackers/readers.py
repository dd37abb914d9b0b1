"""Small independent readers of the files that W&B and TensorBoard write.

A .wandb file has a header of 7 bytes, then LevelDB's log: blocks of 32 KiB with fragments of (checksum, length, kind),
each record a protobuf `Record` of wandb's wandb_internal.proto. An event file of TensorBoard has (length, checksum,
protobuf `Event`, checksum).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def _fragments(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = 7  # ":W&B", magic number, version
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0 or at + 7 + length > len(content):
            return  # a kill has torn it off here
        yield kind, content[at + 7 : at + 7 + length]
        at += 7 + length


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    whole = b""
    for kind, part in _fragments(path.read_bytes()):
        whole = part if kind in (FULL, FIRST) else whole + part
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            yield record


def wandb_rows(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(run id, step) → row, over all offline directories of a run in their order; the last one counts."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name):
        name = ""
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                name = record.run.run_id
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
                found[name, row["step"]] = row
    return found


def tensorboard_rows(run: Path) -> dict[int, dict[str, float]]:
    """step → values; a session that starts at a step makes what older files say from there on void."""
    from tensorboard.compat.proto import event_pb2

    found: dict[int, dict[str, float]] = {}
    files = run.glob("tensorboard/events.out.*")  # ….SECONDS.HOST.PID.NUMBER; NUMBER counts those of a process
    for file in sorted(files, key=lambda path: (path.name.split(".")[3], int(path.name.rpartition(".")[2]))):
        content, at = file.read_bytes(), 0
        while at + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            if at + 16 + length > len(content):
                break
            event = event_pb2.Event()
            event.ParseFromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                found = {step: row for step, row in found.items() if step < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found


def add(path: Path, *added: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in added)
