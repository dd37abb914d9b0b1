"""kill -9 of one rank or all of them at any moment, saves included: every resume ends with the same weights."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from rwkv_train.checkpoint.directory import newest
from tests.runs import SlowStorage, losses, overrides_for, same_weights, start_ranks, train_ranks

OVERRIDES = ("budget.steps=50", "checkpoint.every.steps=5", "validation.every.steps=20", "checkpoint.keep=2")
A_FILE = 0.1  # seconds that SlowStorage takes for it; a save has four or more, one after the other


def kill_once(overrides: list[str], run: Path, in_save: bool, draw: random.Random) -> bool:
    """Starts two ranks and kills the first, the second or both of them; one that is left ends by itself.

    Args:
        overrides: of the run.
        run: its directory.
        in_save: whether that happens within the first save, else some time after the first new step.
        draw: of who is killed, and when.

    Returns:
        whether it hit a save.
    """
    metrics, saving = run / "metrics.jsonl", run.parent / "saving"
    saving.unlink(missing_ok=True)
    rows = metrics.stat().st_size if metrics.exists() else 0
    processes = start_ranks(overrides, 2, SlowStorage(saving, A_FILE))
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and all(process.is_alive() for process in processes):
            size = metrics.stat().st_size if metrics.exists() else 0
            if saving.exists() if in_save else size > rows:
                break
            rows = min(rows, size)  # a resume cuts them
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 2 * A_FILE if in_save else 8 * A_FILE))
        assert all(process.is_alive() for process in processes), "the run ended before it could be killed"
        for process in draw.choice((processes, processes[:1], processes[1:])):
            process.kill()
            process.join()
        hit = any((run / "checkpoints").glob(".writing-*"))
        for process in processes:
            process.join(30)
            assert process.exitcode is not None, "the other rank hangs"
    finally:
        for process in processes:
            process.kill()
    return hit


def kill_and_resume(tmp_path: Path, strategy: str, kills: int, seed: int) -> None:
    """Kills a run so often, every second time in a save, and compares what comes of it with the undisturbed run."""
    run, whole, draw = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole", random.Random(seed)
    train_ranks(overrides_for(tmp_path, "whole", *OVERRIDES, f"strategy={strategy}"), 2)
    overrides = overrides_for(tmp_path, "killed", *OVERRIDES, f"strategy={strategy}")
    hits = []
    for number in range(kills):
        hits.append(kill_once(overrides, run, in_save=number % 2 == 0, draw=draw))
        _, damaged = newest(run / "checkpoints")
        assert not damaged
    assert sum(hits) >= kills / 2, f"half of the kills must hit a save: {hits}"
    train_ranks(overrides, 2)
    assert losses(run) == losses(whole)
    assert same_weights(run, whole)
    assert not list((run / "checkpoints").glob(".writing-*"))


@pytest.mark.slow
def test_two_kills(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, "deepspeed_2", kills=2, seed=1)


@pytest.mark.long
@pytest.mark.timeout(480)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3"])
def test_twenty_kills_over_the_strategies(tmp_path: Path, strategy: str) -> None:
    kill_and_resume(tmp_path, strategy, kills=4, seed=2)
