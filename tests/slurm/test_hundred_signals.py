"""A hundred signals at random moments: each attempt requeues its job once, after a complete checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from rwkv_train import resources
from rwkv_train.checkpoint.directory import newest
from rwkv_train.cli import launcher
from tests import PRELOAD
from tests.runs import losses, overrides_for, rows, same_weights

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

# replaces SLURM's controller, and records the requests
SCONTROL = """\
#!/bin/sh
case $1 in
  show) echo "JobId=7 JobState=RUNNING BatchFlag=1 EndTime=$(date -d '+10 minutes' +%FT%T)" ;;
  *) echo "$@" >>"$(dirname "$0")/asked" ;;
esac
"""


def one_rank(overrides: list[str], path: str, rank: int, ranks: int, port: int) -> None:
    os.environ.update(PATH=f"{path}:{os.environ['PATH']}", SLURM_JOB_ID="7")
    if ranks > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in numbers.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
        resources.__dict__["cpu_cores"] = lambda: ranks
    sys.exit(launcher.main([*overrides, f"trainer.devices={ranks}"]))


def begin(overrides: list[str], path: Path, ranks: int) -> list[ForkServerProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    started = [
        context.Process(target=one_rank, args=(overrides, str(path), rank, ranks, port)) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    return started


def heard(run: Path, began: float) -> bool:
    """Whether the attempt that began at that time has written its first event; from then on it handles signals."""
    return (run / "events.jsonl").exists() and any(row["time"] > began for row in rows(run, "events.jsonl"))


def steps(run: Path) -> int:
    return len(losses(run)) if (run / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize(("ranks", "lanes", "signals"), [(1, 2, 45), (2, 1, 10)])
def test_signals_at_random_moments(tmp_path: Path, ranks: int, lanes: int, signals: int) -> None:
    """Real runs, two at a time: the same loss at every step, and the same weights, as without a signal."""
    folders = [tmp_path / str(lane) for lane in range(lanes)]
    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(lambda folder: disturb(folder, ranks, signals), folders))


def disturb(folder: Path, ranks: int, signals: int) -> None:
    folder.mkdir()
    draw, asked = random.Random(f"{ranks} {folder.name}"), folder / "asked"
    (folder / "scontrol").write_text(SCONTROL)
    (folder / "scontrol").chmod(0o755)
    spans = ["checkpoint.every.steps=3", "validation.every.steps=7", "validation.batches=1", "model.n_layer=1"]
    spans += ["cluster.preflight=100", "optim.schedule.shape=constant", "threads=1"]
    overrides = [
        override
        for override in overrides_for(folder, "run", "budget.steps=100000", *spans)
        if "trainer.devices" not in override
    ]
    run = folder / "runs" / "run"
    for number in range(signals):
        began = time.time()
        started = begin(overrides, folder, ranks)
        try:
            while not heard(run, began):
                assert all(process.is_alive() for process in started)
                time.sleep(0.01)
            before = steps(run)
            while number % 2 and steps(run) == before:  # every second one between steps, not before the first
                assert all(process.is_alive() for process in started)
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.5))
            name, target = draw.choice([signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2]), draw.choice(started)
            assert target.pid is not None
            os.kill(target.pid, name)
            for process in started:
                process.join(100)
            assert [process.exitcode for process in started] == [75, *[0] * (ranks - 1)]
        finally:
            for process in started:
                process.kill()
                process.join()
        found, damaged = newest(run / "checkpoints")
        assert found is not None
        assert not damaged
        assert len(losses(run)) == int(found.name[5:14])  # nothing was lost
        assert asked.read_text().splitlines() == ["requeue 7"] * (number + 1)
    events = [row["event"] for row in rows(run, "events.jsonl") if row["event"] != "checkpoint"]
    assert events == ["started", *["preempted", "requeued", "resumed"] * (signals - 1), "preempted", "requeued"]

    end = {"budget.steps=100000": f"budget.steps={len(losses(run))}", "run.name=run": "run.name=whole"}
    started = begin([end.get(override, override) for override in overrides], folder, ranks)
    for process in started:
        process.join(300)
    assert losses(run) == losses(folder / "runs" / "whole")
    assert found is not None
    assert same_weights_of(found, folder / "runs" / "whole")


def same_weights_of(checkpoint: Path, run: Path) -> bool:
    (checkpoint / "weights.pth").rename(run.parent / "weights.pth")
    return same_weights(run.parent, run)
