"""kill -9 at any moment, resume: every later loss and the final weights are bit-equal to the uninterrupted run's."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from rwkv_train.checkpoint.directory import newest
from rwkv_train.cli import launcher
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows, same_weights, start_slow_saving

OVERRIDES = ("checkpoint.every.steps=4", "validation.every.steps=13", "budget.steps=60")


def complete_checkpoints(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob("step_*")}


def kill_once(folder: Path, name: str, in_save: bool, wait: float) -> bool:
    """Starts the run and kills it some time after its first new checkpoint; returns whether that hit a save."""
    run, saving = folder / "runs" / name, folder / "saving"
    saving.unlink(missing_ok=True)
    before = complete_checkpoints(run)
    process = start_slow_saving(overrides_for(folder, name, *OVERRIDES), saving)
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline and not complete_checkpoints(run) - before:
        time.sleep(0.002)
    time.sleep(wait)
    while in_save and process.is_alive() and time.monotonic() < deadline and not saving.exists():
        time.sleep(0.0005)
    assert process.is_alive(), "the run ended before it could be killed"
    process.kill()
    process.join()
    return any((run / "checkpoints").glob(".writing-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(launcher.load(overrides_for(folder, "whole", *OVERRIDES))) == 0
    return folder / "runs" / "whole"


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_and_resume(tmp_path: Path, whole: Path, seed: int) -> None:
    killed = tmp_path / "runs" / "killed"
    draw = random.Random(seed)
    hits = []
    for attempt in range(6):
        hits.append(kill_once(tmp_path, "killed", in_save=attempt % 2 == 0, wait=draw.uniform(0, 0.3)))
        found, damaged = newest(killed / "checkpoints")
        assert found is not None
        assert not damaged
    assert sum(hits) >= 3, f"half of the kills must hit a save: {hits}"
    assert train(launcher.load(overrides_for(tmp_path, "killed", *OVERRIDES))) == 0
    assert losses(killed) == losses(whole)
    assert [row.get("val/loss") for row in rows(killed)] == [row.get("val/loss") for row in rows(whole)]
    assert same_weights(killed, whole)
    events = [row["event"] for row in rows(killed, "events.jsonl")]
    assert events.count("resumed") == 6
    assert not list((killed / "checkpoints").glob(".writing-*"))
