"""kill -9 of one rank or all of them at any moment, saves included: every resume ends with the same weights."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from rwkv_train.training.checkpoint.directory import newest
from tests.runs import losses, same_weights, start_ranks, train_ranks, words_for

WORDS = ("budget.steps=60", "checkpoint.every.steps=3", "validation.every.steps=20", "checkpoint.keep=2")


def kill_once(words: list[str], run: Path, everybody: bool, wait: float) -> None:
    """Starts two ranks, and kills one or both some time after the first new step; the other then ends by itself."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    processes = start_ranks(words, 2)
    end = time.monotonic() + 120
    while time.monotonic() < end and not (metrics.exists() and metrics.stat().st_size > before):
        before = min(before, metrics.stat().st_size if metrics.exists() else 0)  # a resume cuts it
        time.sleep(0.002)
    time.sleep(wait)
    for process in processes[: 2 if everybody else 1]:
        process.kill()
    for process in processes:
        process.join(30)
        assert process.exitcode is not None, "the other rank hangs"


def kill_and_resume(tmp_path: Path, strategy: str, kills: int, seed: int) -> None:
    run, whole, draw = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole", random.Random(seed)
    train_ranks(words_for(tmp_path, "whole", *WORDS, f"strategy={strategy}"), 2)
    words = words_for(tmp_path, "killed", *WORDS, f"strategy={strategy}")
    for number in range(kills):
        kill_once(words, run, everybody=number % 2 == 1, wait=draw.uniform(0, 0.5))
        found, damaged = newest(run / "checkpoints")
        assert not damaged
    train_ranks(words, 2)
    assert found is not None or kills < 3
    assert losses(run) == losses(whole)
    assert same_weights(run, whole)
    assert not list((run / "checkpoints").glob(".writing-*"))


def test_two_kills(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, "deepspeed_2", kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3"])
def test_four_kills_of_each_strategy(tmp_path: Path, strategy: str) -> None:
    kill_and_resume(tmp_path, strategy, kills=4, seed=2)
