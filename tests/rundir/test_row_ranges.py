"""A start reads the end of its records: ranges of rows found by bisection equal what reading all of them gives."""

from __future__ import annotations

import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from rwkv_train.json_files import parse_json
from rwkv_train.rundir import record_lines, row_ranges
from rwkv_train.rundir.attempts import Attempts, Lineage
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.rundir.history import History, StartHistory
from rwkv_train.training.callbacks.metrics import Spent

DAMAGE = (b"\0" * 40 + b"\n", b'{"step": 3, "tok\n', b'{"step": 3, "tok{"step": 4}\n', bytes(range(128, 160)) + b"\n")


def line_of(step: int) -> bytes:
    return json.dumps({"step": step, "seconds": 0.5, "hours": step / 100, "goodput": 0.5}).encode() + b"\n"


@pytest.mark.parametrize("seed", range(20))
def test_ranges_are_those_of_all_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(row_ranges, "_BLOCK", draw.choice([1, 50, 300]))
    monkeypatch.setattr(row_ranges, "_CHUNK", draw.choice([1, 200, 10**6]))
    steps, lines = sorted(draw.sample(range(1, 60), draw.randrange(30))), []
    for step in steps:
        lines += [draw.choice(DAMAGE)] * (draw.random() < 0.2) + [line_of(step)]
    content = b"".join(lines) + draw.choice([b"", b"half a li"])
    file, size = BytesIO(content), len(b"".join(lines))
    assert row_ranges.complete_size(file) == size
    for wanted in (-1, 0, *draw.sample(range(61), 5), 60):
        end, known = row_ranges.end_of_steps(file, size, wanted), [step for step in steps if step <= wanted]
        assert [record.row["step"] for record in row_ranges.rows_between(file, 0, end)] == known
        assert [record.row["step"] for record in row_ranges.rows_between(file, end, size)] == steps[len(known) :]
        last = row_ranges.last_row_before(file, end)
        assert (None if last is None else last.row["step"]) == (known[-1] if known else None)
        target = BytesIO()
        left_out = row_ranges.copy_rows(file, 0, end, target)
        assert target.getvalue() == b"".join(map(line_of, known))
        counted = lines[: content[:end].count(b"\n")]
        assert left_out == [number for number, line in enumerate(counted, 1) if line in DAMAGE]
        target = BytesIO()
        numbers = row_ranges.copy_rows(file, end, size, target)
        assert target.getvalue() == b"".join(map(line_of, steps[len(known) :]))
        assert left_out + numbers == [number for number, line in enumerate(lines, 1) if line in DAMAGE]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The second attempt goes on at step 99,000 of 99,900, and is at 100,000."""
    run = RunDirectory(str(tmp_path_factory.mktemp("long")), "run")
    for start, first, end in ((0, 1, 99_901), (99_000, 99_001, 100_001)):
        number = run.claim_attempt()
        run.attempts.begin(number, start, number - 1 or None)
        event = {"time": 1000.0 + number, "event": "resumed" if start else "started", "step": start, "tokens": 0}
        (run.attempts.directory(number) / "events.jsonl").write_text(json.dumps(event) + "\n")
        rows = b"".join(
            b'{"step": %d, "seconds": 0.5, "hours": %d.5, "goodput": 0.5}\n' % (step, step)
            for step in range(first, end)
        )
        (run.attempts.directory(number) / "metrics.jsonl").write_bytes(rows)
    return run


def test_a_start_parses_a_few_rows_however_many_there_are(
    long_run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes | str] = []

    def parse(line: bytes | str) -> Any:
        parsed.append(line)
        return parse_json(line)

    monkeypatch.setattr(record_lines, "parse_json", parse)
    history = StartHistory(long_run)
    assert (history.reached, history.attempts[0].ended) == (100_000, "killed")
    assert len(parsed) < 100
    start: dict[str, Any] = history.next_start(99_900)
    assert (start["reached"], start["steps_lost"], start["seconds_lost"]) == (100_000, 100, 50.0)
    assert len(parsed) < 2000, "the 100 repeated rows, and those of a block"
    parsed.clear()
    with long_run.records(2, enabled=True) as (_, metrics):
        assert Spent.of(long_run.attempts, metrics) == Spent(100_000.5, 50_000.25)
        last = metrics.last_row()
    assert last is not None
    assert last["step"] == 100_000
    assert len(parsed) < 3000
    with open(long_run.metrics, "rb") as view:
        assert [int(line[9 : line.index(b",")]) for line in view] == list(range(1, 100_001))


def test_a_start_sees_what_all_records_say(tmp_path: Path) -> None:
    """From every step, over attempts that rewound, were killed at once, or cannot be read."""
    run, draw = RunDirectory(str(tmp_path), "run"), random.Random(1)
    reached = parent = 0
    for _ in range(12):
        number, start = run.claim_attempt(), draw.randrange(reached + 1)
        parents = [span.number for span in Attempts(run.path).lineage().spans if span.contains(start)]
        parent = parents[0] if start and parents else 0
        run.attempts.begin(number, start if parent else 0, parent or None)
        begin, count = start if parent else 0, draw.randrange(6)
        reached = begin + count
        lines = b"".join(draw.choice([b"", b"", *DAMAGE]) + line_of(begin + each + 1) for each in range(count))
        (run.attempts.directory(number) / "metrics.jsonl").write_bytes(lines)
        (run.attempts.directory(number) / "events.jsonl").write_text('{"time": 1.0, "event": "started", "step": 0}\n')
        whole, some = History.read(run), StartHistory(run)
        assert some.reached == whole.reached
        for step in range(reached + 2):
            assert list(some.rows_after(step)) == list(whole.rows_after(step))
        with run.records(number, enabled=True):
            assert run.metrics.read_bytes() == b"".join(record.line for record in run.attempts.metrics())


def test_a_history_is_that_before_its_attempt_begins(long_run: RunDirectory) -> None:
    history = StartHistory(long_run)
    lineage = Lineage(long_run.attempts.starts(), 1)
    assert history.reached == 100_000
    last = long_run.attempts.last_metrics(lineage)
    assert last is not None
    assert last.row["step"] == 99_900
