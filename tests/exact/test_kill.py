"""kill -9 at any moment, resume: every later loss and the final weights are bit-equal to the uninterrupted run's."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_train import launcher
from rwkv_train.training.checkpoint import newest
from rwkv_train.training.run import train
from tests.runs import ROOT, losses, rows, same_weights, words_for

# A storage whose files take a third of a second each: a save lasts longer than the steps between two of them.
SLOW = """
import sys, time
from contextlib import contextmanager
from pathlib import Path
from rwkv_train import launcher
from rwkv_train.training.checkpoint import LocalStorage
from rwkv_train.training.run import train

class Slow(LocalStorage):
    @contextmanager
    def write(self, path):
        with super().write(path) as file:
            yield file
            Path(sys.argv[1]).touch()
            time.sleep(0.1)
        Path(sys.argv[1]).unlink(missing_ok=True)

sys.exit(train(launcher.load(sys.argv[2:]), Slow()))
"""
WORDS = ("checkpoint.every.steps=4", "validation.every.steps=13", "budget.steps=60")


def killed_during(folder: Path, name: str, in_save: bool, wait: float) -> str:
    """Starts the run and kills it: in the middle of writing a checkpoint, or some time after its first step."""
    run, saving = folder / "runs" / name, folder / f"{name}.saving"
    saving.unlink(missing_ok=True)
    before = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
    command = [sys.executable, "-c", SLOW, str(saving), *words_for(folder, name, *WORDS)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size > before:
            break
        before = min(before, metrics.stat().st_size) if metrics.exists() else 0  # a resume cuts rows first
        time.sleep(0.002)
    time.sleep(wait)
    while in_save and process.poll() is None and not saving.exists():
        time.sleep(0.001)
    process.kill()
    return process.communicate()[0]


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_and_resume(tmp_path: Path, seed: int) -> None:
    assert train(launcher.load(words_for(tmp_path, "whole", *WORDS))) == 0
    draw = random.Random(seed)
    hit = 0
    for attempt in range(4):
        killed_during(tmp_path, "killed", in_save=attempt % 2 == 0, wait=draw.uniform(0, 0.4))
        unfinished = list((tmp_path / "runs" / "killed" / "checkpoints").glob(".writing-*"))
        hit += bool(unfinished)
        _, damaged = newest(tmp_path / "runs" / "killed" / "checkpoints")
        assert not damaged
    assert hit >= 2  # half of the kills hit a save
    assert train(launcher.load(words_for(tmp_path, "killed", *WORDS))) == 0
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    assert losses(killed) == losses(whole)
    assert [row.get("val/loss") for row in rows(killed)] == [row.get("val/loss") for row in rows(whole)]
    assert same_weights(killed, whole)
    events = [row["event"] for row in rows(killed, "events.jsonl")]
    assert "resumed" in events
    assert not list((killed / "checkpoints").glob(".writing-*"))
