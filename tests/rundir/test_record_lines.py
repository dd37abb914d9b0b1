"""Records that a dying node, a full disk or a stranger has damaged: good lines count, bad ones are named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from rwkv_train.cli import launcher
from rwkv_train.errors import UserError
from rwkv_train.rundir import jsonl
from rwkv_train.rundir.attempts import Attempts
from rwkv_train.rundir.directory import PassedOver, RunDirectory
from rwkv_train.rundir.durable import write_state
from rwkv_train.rundir.history import History
from rwkv_train.rundir.jsonl import Events, JsonLines
from rwkv_train.rundir.record_lines import event_row, metrics_row
from rwkv_train.rundir.status import status
from rwkv_train.training.run import train
from tests.runs import overrides_for, rows, same_weights, stopped_at

BAD_LINES = {
    "empty": b"",
    "half": b'{"step": 3, "tok',
    "joined": b'{"step": 3, "tok{"step": 4}',
    "zeros": b"\0" * 512,
    "zeros before a row": b'\0\0{"step": 3}',
    "binary": bytes(range(128, 256)),
    "deep": b"[" * 100_000,
    "deep value": b'{"step": 3, "time": 1, "event": "x", "a": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "list": b"[1, 2]",
    "number": b"3",
    "null": b"null",
    "no step": b'{"time": 1}',
    "step is text": b'{"step": "3"}',
    "step is true": b'{"step": true}',
    "step is below 0": b'{"step": -1}',
    "step is beyond a float": b'{"step": 1' + b"0" * 400 + b"}",
    "too many digits": b'{"step": 1' + b"0" * 5000 + b"}",
    "seconds are text": b'{"step": 3, "seconds": "2"}',
    "seconds are NaN": b'{"step": 3, "seconds": NaN}',
    "seconds are null": b'{"step": 3, "seconds": null}',
    "time is infinite": b'{"step": 3, "event": "x", "time": 1e999}',
    "time is huge": b'{"step": 3, "event": "x", "time": 1' + b"0" * 400 + b"}",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_what_is_no_record(line: bytes) -> None:
    assert metrics_row(line) is None
    assert event_row(line) is None


def test_what_is_a_record() -> None:
    assert metrics_row(b'{"step": 3, "train/loss": null}\n') == {"step": 3, "train/loss": None}
    assert event_row(b'{"step": 3}') is None
    assert event_row(b'{"step": 3, "event": 7, "time": 1}') is None
    halved = event_row(b'{"step": 3, "event": "x", "time": 1.5, "reason": "a\\ud800b\\ud83d\\ude00"}')
    assert halved == {"step": 3, "event": "x", "time": 1.5, "reason": "a�b😀"}


def damaged_run(path: Path) -> RunDirectory:
    """One attempt of three steps; each of its files has every bad line between good ones."""
    run = RunDirectory(str(path), "run")
    run.attempts.begin(run.claim_attempt(), 0, None)
    own, bad = run.attempts.directory(1), [line + b"\n" for line in BAD_LINES.values()]
    rows = [json.dumps({"step": step, "tokens": 8 * step, "seconds": 2.0}).encode() + b"\n" for step in (1, 2, 3)]
    (own / "metrics.jsonl").write_bytes(b"".join([rows[0], *bad, rows[1], rows[2]]))
    names = (("started", 0, 1000.0), ("finished", 3, 1010.0))
    events = [json.dumps({"event": n, "step": s, "time": t}).encode() + b"\n" for n, s, t in names]
    (own / "events.jsonl").write_bytes(b"".join([events[0], *bad, events[1]]))
    (own / "watchdog.jsonl").write_bytes(b'{"time":1\n')
    return run


def test_good_rows_are_kept_and_bad_ones_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = damaged_run(tmp_path)
    history = History.read(run)
    assert [row["step"] for row in history.rows] == [1, 2, 3]
    assert [row["event"] for row in history.events] == ["started", "finished"]
    count = len(BAD_LINES)
    assert history.notes == [
        f"attempts/0001/events.jsonl: left out {count} lines that are no records (lines 2, 3, 4, 5, 6, …)",
        "attempts/0001/watchdog.jsonl: left out 1 line that is no record (line 1)",
        f"attempts/0001/metrics.jsonl: left out {count} lines that are no records (lines 2, 3, 4, 5, 6, …)",
    ]
    with run.records(1, True) as (events, metrics):
        assert [row["step"] for row in metrics.rows()] == [1, 2, 3]
        assert [row["event"] for row in events.rows()] == ["started", "finished"]
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3]
    assert [json.loads(line)["event"] for line in run.events.read_text().splitlines()] == ["started", "finished"]
    assert status([run.path]) == 0
    printed = capsys.readouterr().out
    assert "finished" in printed
    assert "attempts/0001/watchdog.jsonl: left out 1 line that is no record (line 1)" in printed


def test_damaged_lines_are_counted_where_a_later_attempt_stops_counting(tmp_path: Path) -> None:
    run = damaged_run(tmp_path)
    run.attempts.begin(run.claim_attempt(), 2, 1)
    with open(run.attempts.directory(1) / "events.jsonl", "ab") as file:
        file.write(b'{"event": "failed", "step": 3, "time": 2000.0}\n')
    assert [record.row["event"] for record in Attempts(run.path).events()] == ["started", "finished"]
    assert [record.row["step"] for record in Attempts(run.path).metrics()] == [1, 2]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_record_file_that_is_none(make: Callable[[Path], None], tmp_path: Path) -> None:
    run = damaged_run(tmp_path)
    path = run.attempts.directory(1) / "metrics.jsonl"
    path.unlink()
    make(path)
    history = History.read(run)
    assert history.rows == []
    assert any(note.startswith("attempts/0001/metrics.jsonl cannot be read: ") for note in history.notes)


def test_a_row_begins_a_new_line_behind_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste')  # the disk took a part, and could not be made to give it back
    lines = JsonLines(path)
    lines.append({"step": 2})
    lines.append({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"ste\n{"step": 2}\n{"step": 3}\n'
    assert [row["step"] for row in lines.rows()] == [1, 2, 3]
    events = Events(tmp_path / "events.jsonl")
    (tmp_path / "events.jsonl").write_bytes(b'{"step": 1}\n')
    events.add("started", 0)
    assert [row["event"] for row in events.rows()] == ["started"]


BAD_STATES = (b"", b"{", b"[]", b"null", b"\0" * 64, b'{"rewinds": "1", "skipped": []}', b"[" * 100_000)


@pytest.mark.parametrize("content", BAD_STATES)
def test_passed_over_that_cannot_be_read_is_that_of_the_last_rewind(content: bytes, tmp_path: Path) -> None:
    run = damaged_run(tmp_path)
    assert run.read_passed_over() == PassedOver()
    run.passed_over.write_bytes(content)
    lost = run.read_passed_over()
    assert (lost.rewinds, lost.skipped) == (0, ())
    assert "passed_over.json cannot be read" in str(lost.note)
    assert "no rewind is recorded" in str(lost.note)
    with open(run.attempts.directory(1) / "events.jsonl", "a") as file:
        row = {"event": "rewound", "step": 1, "time": 2000.0, "rewinds": 2, "skipped": [[32, 16], [64, 8]]}
        file.write(json.dumps(row) + "\n")
    found = run.read_passed_over()
    assert (found.rewinds, found.skipped) == (2, ((32, 16), (64, 8)))
    assert "taken from the last rewind in events.jsonl" in str(found.note)
    write_state(run.passed_over, found.as_json())
    assert run.read_passed_over() == PassedOver(2, ((32, 16), (64, 8)))


def test_passed_over_of_an_earlier_version(tmp_path: Path) -> None:
    run = damaged_run(tmp_path)
    write_state(run.passed_over, {"rewinds": 1, "skips": [[3, 4]]})
    with pytest.raises(UserError, match="is of an earlier version: it counts steps"):
        run.read_passed_over()


def test_a_run_resumes_beside_damaged_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows are those of a run that nothing has happened to, without the one whose line is damaged."""
    few = ("budget.steps=8", "checkpoint.every.steps=4", "validation.every.steps=100", "trainer.precision=32-true")
    assert train(launcher.load(overrides_for(tmp_path, "whole", *few))) == 0
    assert "left out" not in capsys.readouterr().out
    run = stopped_at(tmp_path / "runs" / "whole", 4, "run")
    own = run / "attempts" / "0001"
    lines = (own / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (own / "metrics.jsonl").write_bytes(b"".join([lines[0], b"\0" * 512 + b"\n", *lines[2:]]))
    with open(own / "events.jsonl", "ab") as file:
        file.write(bytes(range(128, 256)) + b"\n")
    (own / "watchdog.jsonl").write_bytes(b'{"time":1\n')
    (run / "passed_over.json").write_bytes(b"")
    assert train(launcher.load(overrides_for(tmp_path, "run", *few))) == 0
    printed = capsys.readouterr().out
    for note in (
        "WARNING: attempts/0001/metrics.jsonl: left out 1 line that is no record (line 2)",
        "WARNING: attempts/0001/watchdog.jsonl: left out 1 line that is no record (line 1)",
        "passed_over.json cannot be read",
    ):
        assert note in printed
    whole = rows(tmp_path / "runs" / "whole")
    assert [(row["step"], row["train/loss"]) for row in rows(run)] == [
        (row["step"], row["train/loss"]) for row in whole if row["step"] != 2
    ]
    assert same_weights(run, tmp_path / "runs" / "whole")


def test_a_disk_that_refuses_rows_is_asked_to_take_few_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait; all are written once there is room."""
    asked, room, written = [], [False], jsonl.append

    def append(file: BinaryIO, data: bytes) -> None:
        asked.append(data.count(b"\n"))
        if not room[0]:
            raise OSError(28, "No space left on device")
        written(file, data)

    monkeypatch.setattr(jsonl, "append", append)
    lines = JsonLines(tmp_path / "rows.jsonl")
    for step in range(1000):
        lines.append({"step": step})
    assert lines.lost == 1000
    assert max(asked) == 256
    room[0] = True
    lines.append({"step": 1000})
    assert lines.lost == 0
    assert [row["step"] for row in lines.rows()] == list(range(1001))
