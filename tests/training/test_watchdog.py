"""A rank that hangs is named and ends the run on all ranks within 30 seconds; the resumed run is bit-equal."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rwkv_train.cli import launcher
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows, same_weights, start_ranks, train_ranks
from tests.training.test_signals import number_of, wait_for

QUICK_WATCHDOG = ("watchdog.floor=5", "checkpoint.every.steps=10", "validation.every.steps=1000", "strategy=ddp")


def trouble(**settings: Any) -> list[str]:
    overrides = ["packages=[tests]", "+callbacks.trouble._target_=tests.training.spies.Trouble"]
    return [*overrides, *(f"+callbacks.trouble.{name}={value}" for name, value in settings.items())]


def watchdog_rows(run: Path, number: int = 1) -> list[dict[str, Any]]:
    return rows(run / "attempts" / f"{number:04d}", "watchdog.jsonl")


def ends(overrides: list[str], run: Path, stop: int | None = None) -> list[int | None]:
    """The exit codes of two ranks, one of which is stopped or stops by itself."""
    processes = start_ranks(overrides, 2)
    try:
        wait_for(run, 15)
        if stop is not None:
            os.kill(number_of(processes[stop]), signal.SIGSTOP)
        began = time.monotonic()
        for process in processes:
            process.join(100)
        assert time.monotonic() - began < 90  # 5 s of limit, 30 to the end: the rest is for a machine with much to do
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_is_named_and_the_resumed_run_is_bit_equal(tmp_path: Path, rank: int) -> None:
    whole, run = tmp_path / "runs" / "whole", tmp_path / "runs" / "run"
    steps = "budget.steps=60"
    overrides = overrides_for(tmp_path, "run", *QUICK_WATCHDOG, steps, *trouble(rank=0, seconds=0.05))
    codes = ends(overrides, run, stop=rank)
    assert codes == [76, 76]
    (row,) = [row for row in watchdog_rows(run) if row["event"] == "failed"]
    assert row["ranks"] == [rank]
    assert f"rank {rank} on " in row["reason"]
    assert "has been stopped for" in row["reason"]
    for number in (0, 1):
        stacks = (run / "attempts" / "0001" / f"stacks_rank_{number:04d}.txt").read_text()
        assert "in fit" in stacks or " fit (" in stacks or "py-spy: " in stacks
    train_ranks(overrides_for(tmp_path, "run", *QUICK_WATCHDOG, steps, "run.allow_changes=true"), 2)
    train_ranks(overrides_for(tmp_path, "whole", *QUICK_WATCHDOG, steps), 2)
    assert losses(run) == losses(whole)
    assert same_weights(run, whole)
    happened = [row["event"] for row in rows(run, "events.jsonl") if row["event"] != "checkpoint"]
    assert happened == ["started", "failed", "resumed", "finished"]


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_own_code_is_named_and_not_the_one_that_waits(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    overrides = overrides_for(tmp_path, "run", *QUICK_WATCHDOG, "budget.steps=400", *trouble(rank=1, hangs_at=20))
    assert ends(overrides, run) == [76, 76]
    (row,) = [row for row in watchdog_rows(run) if row["event"] == "failed"]
    assert row["ranks"] == [1]
    assert "of step 20 for" in row["reason"]
    assert "on_before_zero_grad" in (run / "attempts" / "0001" / "stacks_rank_0001.txt").read_text()


@pytest.mark.slow
def test_a_straggler_is_named(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    few = ["watchdog.slow_steps=10", "budget.steps=60", *trouble(rank=1, seconds=0.3)]
    train_ranks(overrides_for(tmp_path, "run", *QUICK_WATCHDOG, *few), 2)
    assert {row["rank"] for row in watchdog_rows(run) if row["event"] == "straggler"} == {1}
    assert "straggler" in {row["event"] for row in rows(run, "events.jsonl")}


def test_without_a_watchdog_there_is_none(tmp_path: Path) -> None:
    assert train(launcher.load(overrides_for(tmp_path, "run", "budget.steps=2", "watchdog.enabled=false"))) == 0
    assert len(losses(tmp_path / "runs" / "run")) == 2
