"""Trackers: after faults of the run or of a tracker, the tracker still gets all rows, and training is not delayed."""

from __future__ import annotations

import csv
import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from rwkv_train.cli import launcher
from rwkv_train.errors import UserError
from rwkv_train.rundir.jsonl import MetricsRow
from rwkv_train.trackers import LocalTracker, TrackedRun, Tracker, flat, read_state
from rwkv_train.trackers.csv_table import CSV, write_csv
from rwkv_train.trackers.follow import Follower, Tail, follow
from rwkv_train.trackers.launch import LocalTrackers
from rwkv_train.trackers.tensorboard import TensorBoard
from rwkv_train.trackers.wandb import Wandb
from rwkv_train.training import observers
from rwkv_train.training.run import train
from tests.runs import overrides_for, rows
from tests.trackers.readers import add, tensorboard_rows, wandb_rows
from tests.trackers.spies import Memory

ALL_TRACKERS = [
    "logger=wandb",
    "logger.wandb.mode=offline",
    "+logger.tensorboard._target_=rwkv_train.trackers.tensorboard.TensorBoard",
    "+logger.csv._target_=rwkv_train.trackers.csv_table.CSV",
]


def narrow(number: float) -> float:
    """As TensorBoard stores it: in float32."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def check_copies(run: Path) -> None:
    """All three copies have each step once, with the values of metrics.jsonl."""
    truth = {row["step"]: dict(flat(row)) for row in rows(run)}
    name = json.loads((run / "trackers" / "wandb.json").read_text())["id"]
    sent = {step: row for (id_, step), row in wandb_rows(run).items() if id_ == name}
    assert sent.keys() == truth.keys()
    for step, row in truth.items():
        assert {key: value for key, value in sent[step].items() if not key.startswith("_")} == row
    board = tensorboard_rows(run)
    assert board.keys() == truth.keys()
    for step, row in truth.items():
        assert board[step] == {k: narrow(v) for k, v in row.items() if k not in ("step", "time")}
    with open(run / "metrics.csv", newline="") as file:
        table = {int(row["step"]): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}
    assert table == truth


def test_all_of_them(tmp_path: Path) -> None:
    """A run in two parts: one run of W&B, no gap, no step twice in any tracker."""
    overrides = overrides_for(tmp_path, "run", *ALL_TRACKERS, "statistics.every.steps=5", "run.allow_changes=true")
    assert train(launcher.load([*overrides, "budget.steps=12"])) == 0
    run = tmp_path / "runs" / "run"
    first = json.loads((run / "trackers" / "wandb.json").read_text())
    assert first["sent"] == 12
    check_copies(run)
    assert train(launcher.load([*overrides, "budget.steps=20"])) == 0
    assert json.loads((run / "trackers" / "wandb.json").read_text()) == {**first, "sent": 20, "reached": 20}
    check_copies(run)
    assert len(list(run.glob("wandb/offline-run-*"))) == 2


def follower(folder: Path, tracker: Tracker, step: int = 0) -> Follower:
    notes = folder / "trackers" / "it.json"
    return Follower(tracker, TrackedRun(folder, "run"), step, notes, folder / "m.jsonl", folder / "e.jsonl")


def test_the_file_is_the_queue(tmp_path: Path) -> None:
    """Rows come as they are written, an incomplete one later; those after a rewind replace the earlier ones."""
    tracker = Memory()
    it = follower(tmp_path, tracker)
    assert it.catch_up() == 0
    add(tmp_path / "m.jsonl", *({"step": s, "x": 1} for s in (1, 2, 3, 4)))
    with open(tmp_path / "m.jsonl", "a") as file:
        file.write('{"step": 5, ')
    assert it.catch_up() == 4
    with open(tmp_path / "m.jsonl", "a") as file:
        file.write('"x": 1}\n')
    assert it.catch_up() == 1
    # the run goes back to step 2
    lines = (tmp_path / "m.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "m.jsonl").write_text("".join(lines[:2]))
    add(tmp_path / "e.jsonl", {"time": time.time(), "event": "rewound", "step": 2})
    add(tmp_path / "m.jsonl", *({"step": s, "x": 2} for s in (3, 4, 5, 6)))
    it.catch_up()
    assert {step: row["x"] for step, row in tracker.rows.items()} == {1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 6: 2}
    assert [event["event"] for event in tracker.events] == ["rewound"]
    # the next process continues from step 4
    again = Memory()
    it = follower(tmp_path, again, step=4)
    lines = (tmp_path / "m.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "m.jsonl").write_text("".join(lines[:4]))
    add(tmp_path / "m.jsonl", {"step": 5, "x": 3})
    it.catch_up()
    assert set(again.rows) == {5}
    # one that continues from step 2 and is killed before anything is stored: the next one sends again from there
    killed = Memory()
    killed.flush = lambda: None  # type: ignore[method-assign]
    follower(tmp_path, killed, step=2).catch_up()
    last = Memory()
    follower(tmp_path, last, step=4).catch_up()
    assert set(last.rows) == {3, 4, 5}


def test_a_tracker_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its failure is reported once, it is retried, and has all rows in the end; one that never works is given up."""
    add(tmp_path / "m.jsonl", {"step": 1}, {"step": 2})
    tracker, reported, waited = Memory(failures=3), list[str](), list[float]()

    def over(seconds: float) -> bool:
        waited.append(seconds)
        return len(waited) > 5

    follow(follower(tmp_path, tracker), over, reported.append)
    assert reported == ["ConnectionError: no answer"]
    assert set(tracker.rows) == {1, 2}
    assert tracker.ended
    assert waited[:3] == [5, 30, 120]
    hopeless = Memory(failures=10**9)
    waited.clear()
    follow(follower(tmp_path, hopeless), over, reported.append)
    assert not hopeless.ended


@pytest.mark.parametrize("kind", ["Hanging", "Failing"])
def test_training_is_not_delayed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(observers, "TRACKER_SECONDS", 2.0 if kind == "Hanging" else 90.0)
    overrides = [f"+logger.it._target_=tests.trackers.spies.{kind}", "packages=[tests]", "budget.steps=20"]
    began = time.monotonic()
    assert train(launcher.load(overrides_for(tmp_path, "run", *overrides))) == 0
    assert len(rows(tmp_path / "runs" / "run")) == 20
    assert time.monotonic() - began < 60
    printed = capfd.readouterr()
    if kind == "Hanging":
        assert "logger=it has not taken all rows within 2 s and was ended" in printed.out
    else:
        assert (
            printed.err.count("logger=it: OSError: [Errno 28] No space left on device; training continues, it gets")
            == 1
        )


def test_wandb_without_a_key(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is written offline, and the message names the command that sends it later."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    overrides = overrides_for(tmp_path, "run", "logger=wandb", "budget.steps=6", "logger.wandb.mode=online")
    assert train(launcher.load(overrides)) == 0
    printed = capfd.readouterr().err
    assert "logger=wandb: No API key" in printed
    assert "the run is written offline" in printed
    assert {step for _, step in wandb_rows(tmp_path / "runs" / "run")} == set(range(1, 7))


def wandb_id(directory: Path, state: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The id of W&B that a run directory takes, and what is kept for its next start."""
    tracker = Wandb()
    tracker.state.update(state)
    tracker._own_id(directory)
    return tracker.state["id"], tracker.state


def test_a_copied_run_is_another_run_of_wandb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    id_, state = wandb_id(run, {"sent": 7, "reached": 9})
    assert wandb_id(run, state) == (id_, state)
    shutil.copytree(run, tmp_path / "copy")
    capsys.readouterr()
    other, of_copy = wandb_id(tmp_path / "copy", state)
    assert other != id_
    assert "sent" not in of_copy, "it gets all rows"
    assert f"copy is a copy of {run}, which keeps its W&B run {id_}" in capsys.readouterr().err
    assert wandb_id(tmp_path / "copy", of_copy)[0] == other
    run.rename(tmp_path / "moved")
    moved, of_moved = wandb_id(tmp_path / "moved", state)
    assert (moved, of_moved["sent"], of_moved["path"]) == (id_, 7, str(tmp_path / "moved"))
    assert capsys.readouterr().err == ""
    kept, _ = wandb_id(tmp_path / "copy", of_moved | {"path": str(tmp_path / "gone")})  # from another file system
    assert kept == id_
    assert f"goes on as W&B run {id_} of {tmp_path / 'gone'}, which is not there any more" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["export PATH=/bin\n", "name,step\n", "stepper,time\n"])
def test_the_table_replaces_no_other_file(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    trackers = LocalTrackers({"csv": CSV(str(path))}, TrackedRun(tmp_path, "run"), 0, tmp_path / "metrics.jsonl")
    assert f"logger=csv: UserError: {path} exists and is no table of metrics" in capsys.readouterr().err
    trackers.close_local()
    with pytest.raises(UserError, match="is no table of metrics"):
        write_csv([row(1, 2.0)], path)
    assert path.read_text() == content
    path.unlink()
    for steps in ([], [1], [1, 2]):  # one of its own is replaced
        write_csv([row(step, 2.0) for step in steps], path)
        assert len(path.read_text().splitlines()) == 1 + len(steps)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is no table of metrics"):
        write_csv([row(1, 2.0)], tmp_path / "link")


def test_flat() -> None:
    lives = [[1.0, 2.0, 3.0, 4.0, 5.0]]
    found = dict(flat({"step": 1, "a": [1.0, None], "decay/half_life": lives, "b": [[6.0, 7.0]], "c": None}))
    assert found == {
        "step": 1,
        "a/00": 1.0,
        "decay/half_life/00/minimum": 1.0,
        "decay/half_life/00/p10": 2.0,
        "decay/half_life/00/median": 3.0,
        "decay/half_life/00/p90": 4.0,
        "decay/half_life/00/maximum": 5.0,
        "b/00/0": 6.0,
        "b/00/1": 7.0,
    }


def test_tail_of_nothing(tmp_path: Path) -> None:
    assert list(Tail(tmp_path / "no.jsonl").rows()) == []


def row(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "time": 1e9 + step, "train/loss": loss}


def test_tensorboard_reads_it_as_we_do(tmp_path: Path) -> None:
    """A process that is killed after step 5, one that continues from step 3, and a rewind to step 4."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = TrackedRun(tmp_path, "run")
    first = TensorBoard()
    first.open(run, 0, list)
    for step in range(1, 6):
        first.row(row(step, float(step)))
    first._flush()
    second = TensorBoard()
    second.open(run, 3, list)
    for step in (4, 5, 6):
        second.row(row(step, 10.0 + step))
    second.event({"time": 1e9, "event": "rewound", "step": 4})
    second.row(row(5, 20.0))
    second.close(list)
    expected = {1: 1.0, 2: 2.0, 3: 3.0, 4: 14.0, 5: 20.0}
    assert {step: row["train/loss"] for step, row in tensorboard_rows(tmp_path).items()} == expected
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert {event.step: event.value for event in read.Scalars("train/loss")} == expected
    assert "rewound" in str(read.Tensors("events/text_summary"))


@pytest.mark.parametrize("stored", [0, 2, 4])
def test_what_a_kill_has_lost_is_written_again(tmp_path: Path, stored: int) -> None:
    """Rows up to a step are on the disk, four are in metrics.jsonl, and the run continues from the third."""
    run, rows_ = TrackedRun(tmp_path, "run"), [row(step, float(step)) for step in range(1, 5)]
    if stored:
        killed = TensorBoard()
        killed.open(run, 0, list)
        for each in rows_[:stored]:
            killed.row(each)
        killed.close(list)
    tracker = TensorBoard()
    tracker.open(run, 3, lambda: rows_)
    tracker.row(row(4, 40.0))
    tracker.close(list)
    board = tensorboard_rows(tmp_path)
    assert {step: each["train/loss"] for step, each in board.items()} == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}


class Raising(LocalTracker):
    def row(self, row: MetricsRow) -> None:
        raise OSError(28, "No space left on device")


def test_a_local_tracker_that_raises_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = TensorBoard()
    trackers = LocalTrackers({"a": Raising(), "b": board}, TrackedRun(tmp_path, "run"), 0, tmp_path / "metrics.jsonl")
    for step in (1, 2):
        trackers.row(row(step, 1.0))
    trackers.close_local()
    assert tensorboard_rows(tmp_path).keys() == {1, 2}
    printed = capsys.readouterr().err
    assert printed.count("logger=a: OSError: [Errno 28] No space left on device; training continues without it") == 1
    assert f"rwkv-train report {tmp_path} --push a" in printed


BAD_STATES = ("", "{", "[]", '{"sent": "4"}', '{"sent": -1}', '{"id": 7}', '{"id": "a-b-c"}', "[" * 100_000)


@pytest.mark.parametrize("content", BAD_STATES)
def test_a_state_that_cannot_be_read_begins_a_new_copy(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "trackers" / "tensorboard.json"
    notes.parent.mkdir()
    notes.write_text(content)
    with pytest.raises(ValueError, match=r"tensorboard\.json cannot be read: "):
        read_state(notes)
    rows_ = [row(step, float(step)) for step in (1, 2, 3)]
    board = TensorBoard()
    board.open(TrackedRun(tmp_path, "run"), 3, lambda: rows_)
    board.close(list)
    assert tensorboard_rows(tmp_path).keys() == {1, 2, 3}
    assert read_state(notes) == {"sent": 3}
    assert "all rows are written again" in capsys.readouterr().err
    notes.write_text(content)
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    metrics.write_bytes(b'\0\0\n{"step": 1}\n{"st\n{"step": 2}\n')
    events.write_bytes(b'{"time": 1}\n')
    follower = Follower(Memory(), TrackedRun(tmp_path, "run"), 0, notes, metrics, events)
    assert "tensorboard.json cannot be read" in str(follower.note)
    assert follower.catch_up() == 2
    follower.end()
    assert read_state(notes)
