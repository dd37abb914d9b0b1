"""A run killed five times has in metrics.jsonl, TensorBoard and W&B's offline files what the uninterrupted one has."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rwkv_train.cli import launcher
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows, start
from tests.trackers.readers import tensorboard_rows
from tests.trackers.test_trackers import ALL_TRACKERS, check_copies

OVERRIDES = ("checkpoint.every.steps=5", "budget.steps=120", "statistics.every.steps=20")


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(each) for each in found] + [grand for each in found for grand in children(int(each))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_killed_five_times(tmp_path: Path) -> None:
    """With its trackers every second time, as when a machine goes down; else they write what is left."""
    assert train(launcher.load(overrides_for(tmp_path, "whole", *OVERRIDES))) == 0
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    draw = random.Random(3)
    for attempt in range(5):
        goal = 20 * (attempt + 1)
        with start(overrides_for(tmp_path, "killed", *OVERRIDES, *ALL_TRACKERS)) as process:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                if (killed / "metrics.jsonl").exists() and len(
                    (killed / "metrics.jsonl").read_bytes().splitlines()
                ) >= goal:
                    break
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
            assert process.poll() is None, "the run ended before it could be killed"
            others = children(process.pid)
            for pid in [process.pid, *(others if attempt % 2 else [])]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while time.monotonic() < deadline and any(alive(pid) for pid in others):
                time.sleep(0.05)  # the trackers' processes take the rows so far
    assert train(launcher.load(overrides_for(tmp_path, "killed", *OVERRIDES, *ALL_TRACKERS))) == 0
    assert losses(killed) == losses(whole)
    board = tensorboard_rows(killed)
    assert {step: row["train/loss"] for step, row in board.items()} == {
        row["step"]: pytest.approx(row["train/loss"], rel=1e-7) for row in rows(whole)
    }
    check_copies(killed)
