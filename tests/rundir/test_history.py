"""What the records of a run show: how each attempt ended, consecutive failures, goodput, and `rwkv-train status`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rwkv_train.errors import UserError
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.rundir.history import History
from rwkv_train.rundir.status import status

Rows = list[dict[str, Any]]


def steps(last: int, seconds: float = 2.0) -> Rows:
    return [
        {"step": step, "tokens": 10 * step, "train/loss": 5 - step / 100, "seconds": seconds}
        for step in range(1, last + 1)
    ]


def events_of(*events: tuple[str, int, dict[str, Any]], begin: float = 1000.0) -> Rows:
    return [
        {"time": begin + 10 * number, "event": event, "step": step, "tokens": 10 * step, **more}
        for number, (event, step, more) in enumerate(events)
    ]


def failing(*reached: int, ended: str | None = "failed") -> History:
    """Attempts that failed after these steps, each from step 0."""
    events: list[tuple[str, int, dict[str, Any]]] = []
    for number, step in enumerate(reached):
        before = {"after": ended or "killed", "reached": reached[number - 1]} if number else {}
        events.append(("started", 0, before))
        if ended is not None:
            events.append((ended, step, {"reason": f"why {number}"}))
    return History(events_of(*events), steps(reached[-1]))


@pytest.mark.parametrize(
    ("reached", "failures"),
    [([7], 1), ([7, 7], 2), ([7, 7, 7], 3), ([7, 7, 8], 1), ([9, 7, 7], 2), ([7, 8, 7], 1), ([0, 0, 0], 3)],
)
def test_failures_at_one_step(reached: list[int], failures: int) -> None:
    assert failing(*reached).failures() == failures
    assert failing(*reached, ended=None).failures() == failures  # killed: no end was recorded
    assert failing(*reached, ended="preempted").failures() == 0
    assert failing(*reached).last_failure() == f"why {len(reached) - 1}"


def test_what_came_between_failures() -> None:
    assert History([], []).failures() == 0
    events = events_of(
        ("started", 0, {}),
        ("failed", 7, {}),
        ("started", 0, {"after": "failed", "reached": 7}),
        ("preempted", 7, {}),
        ("requeued", 7, {}),
        ("resumed", 7, {"after": "requeued", "reached": 7}),
        ("failed", 7, {}),
    )
    assert History(events, steps(7)).failures() == 1
    events += events_of(("given_up", 7, {}))
    assert History(events, steps(7)).failures() == 0  # a user who starts it again has changed something


def test_details_of_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(History([], []).next_start(0)) == {"seconds_starting"}
    history = History(events_of(("started", 0, {}), ("checkpoint", 20, {})), steps(27), alive=time.time() - 100)
    row = history.next_start(20)
    assert (row["after"], row["reached"], row["steps_lost"], row["seconds_lost"]) == ("killed", 27, 7, 14.0)
    assert row["seconds_down"] == pytest.approx(max(0.0, 100 - row["seconds_starting"]), abs=2)


def goodput() -> History:
    """100 s: 60 in steps that count, 8 in steps done again, 6 in checkpoints, 9 down, 5 + 4 starting, 8 in the rest."""
    events = events_of(
        ("started", 0, {"seconds_starting": 5.0}),
        ("checkpoint", 10, {"pause": 2.0}),
        ("checkpoint", 20, {"pause": 3.0}),
        ("failed", 24, {"reason": "rank 1 on n2: RuntimeError: boom"}),
        (
            "resumed",
            20,
            {
                "after": "failed",
                "reached": 24,
                "steps_lost": 4,
                "seconds_lost": 8.0,
                "seconds_down": 9.0,
                "seconds_starting": 4.0,
            },
        ),
        ("checkpoint", 30, {"pause": 1.0}),
        ("finished", 30, {}),
    )
    return History([*events[:-1], {**events[-1], "time": 1095.0}], steps(30), alive=2000.0)


def test_goodput() -> None:
    account = goodput().account()
    assert account.wall == 100.0
    assert account.productive == 60.0
    assert account.goodput == 0.6
    assert account.lost == {
        "down": 9.0,
        "steps done again": 8.0,
        "starting": 9.0,
        "checkpoints": 6.0,
        "loading, validation and the rest": 8.0,
    }
    assert account.productive + sum(account.lost.values()) == account.wall
    assert History([], []).account().goodput == 0.0


def write(run: Path, history: History) -> Path:
    """A run directory with these records, all of them of one attempt."""
    directory = RunDirectory(str(run.parent), run.name)
    number = directory.attempts.claim()
    directory.attempts.begin(number, 0, None)
    own = directory.attempts.directory(number)
    for name, rows in (("events.jsonl", history.events), ("metrics.jsonl", history.rows)):
        (own / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with directory.records(number, True):
        return run


def shown(capsys: pytest.CaptureFixture[str], paths: Sequence[Path], code: int = 0) -> str:
    assert status(paths) == code
    return capsys.readouterr().out


def test_status_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "one", goodput())
    (run / "config.yaml").write_text("budget: {steps: null, tokens: 300}\nbatch: {tokens: 10}\n")
    printed = shown(capsys, [run])
    for part in (
        "finished",
        "30 of 30",
        "300",
        "4.7000",
        "steps 0 to 24  failed (rank 1 on n2: RuntimeError: boom); 4 steps repeated, 8.0 s",
        "goodput 60.0%: 1.0 min in steps of the run, of 1.7 min",
        "  9.0 s    9.0%  down",
        "restarted after 9.0 s",
    ):
        assert part in printed, printed


def test_status_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / "a", goodput()), write(tmp_path / "b", failing(7))]
    now = time.time()
    going = History([{"time": now, "event": "started", "step": 0}], steps(3))
    runs.append(write(tmp_path / "c", going))
    printed = shown(capsys, runs, code=1)
    for part in ("finished", "failed", "running"):
        assert part in printed
    events = [*failing(5, 5, 5).events, *events_of(("given_up", 5, {}), begin=2000.0)]
    runs = [write(tmp_path / "d", History(events, steps(5)))]
    assert "given up at step 5" in shown(capsys, runs, code=1)


def test_status_of_no_run(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "a", goodput())
    with pytest.raises(UserError, match=r"runs: there is no run\n.*such as .*/runs/a$"):
        status([tmp_path / "runs"])
    with pytest.raises(UserError, match="there is no such directory"):
        status([tmp_path / "nothing"])


def test_a_clock_that_went_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two days between two attempts: the parts are at most all of the time, whichever of them the clock falsified."""
    first = events_of(("started", 0, {"seconds_starting": 5.0}), ("failed", 20, {}), begin=1e6)
    starting = {"after": "failed", "reached": 20, "seconds_down": 2 * 86400.0, "seconds_starting": -2 * 86400.0}
    second = events_of(("resumed", 20, starting), ("finished", 30, {}), begin=1e6 - 2 * 86400)
    account = History([*first, *second], steps(30)).account()
    assert account.productive == 60.0
    assert account.lost["starting"] == 5.0
    assert account.wall == 60.0 + 5.0 + 2 * 86400
    assert account.productive + sum(account.lost.values()) == account.wall
    assert min(account.lost.values()) >= 0
    printed = shown(capsys, [write(tmp_path / "run", History([*first, *second], steps(30)))], code=1)
    assert all(float(share) <= 100 for share in re.findall(r"([\d.]+)%", printed)), printed


def test_status_of_a_run_whose_last_loss_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "train/loss": None} for row in steps(3)]
    assert "finished" in shown(capsys, [write(tmp_path / "run", History(goodput().events, rows))])


def test_the_time_to_start_is_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 2 * 86400)
    row = failing(7).next_start(0)
    assert row["seconds_starting"] == 0.0
    assert row["seconds_down"] == pytest.approx(now - 2 * 86400 - 1010.0, abs=1)
