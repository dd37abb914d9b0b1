"""Runs of two nodes with faults: each ends with the weights of the undisturbed run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.runs import losses, same_weights, train_ranks
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Training

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

STEPS = 60
OVERRIDES = [  # the default data, a model that costs nothing
    "model.n_layer=2",
    "arch=rwkv4",
    "model.n_embd=32",
    "batch.context=32",
    "batch.tokens=128",
    f"budget.steps={STEPS}",
    "optim.schedule.warmup.steps=5",
    "data.hold_out=0",  # the n-gram models of the held-out text would take longer than the run
    "checkpoint.every.steps=20",
    "samples.tokens=0",
    "trainer.accelerator=cpu",
    "threads=1",
]
PACED = [
    *("packages=[tests]", "+callbacks.pace._target_=tests.slurm.pace.Pace"),
    "cluster.preflight=120",  # the machine is full
    "watchdog.floor=12",
]


def time_limit(training: Training) -> list[str]:
    """SLURM itself sends the signal of train.sbatch, since the job's time is nearly up."""
    training.reach(12)
    training.cluster.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=+0", "EndTime=now+50")
    training.wait(lambda: "requeued" in training.story(), "SIGUSR1")
    training.cluster.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=10")
    return ["started", "preempted", "requeued", "resumed", "finished"]


def requeued_by_hand(training: Training) -> list[str]:
    training.reach(25)
    training.cluster.run("scontrol", "requeue", training.job)
    return ["started", "preempted", "resumed", "finished"]


def node_down(training: Training) -> list[str]:
    training.reach(25)
    node = training.cluster.run(
        "scontrol", "show", "hostnames", training.cluster.job(training.job)["NodeList"]
    ).split()[1]
    training.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    training.wait(lambda: training.cluster.job(training.job)["Restarts"] == "1", "SLURM's own requeue")
    training.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    return ["started", "…", "resumed", "finished"]


def killed(training: Training) -> list[str]:
    training.reach(25)
    os.kill(training.processes()[1], signal.SIGKILL)
    return ["started", "failed", "resumed", "finished"]


def stopped(training: Training) -> list[str]:
    """A rank that neither computes nor ends: the watchdog names it."""
    training.reach(25)
    os.kill(training.processes()[1], signal.SIGSTOP)
    return ["started", "failed", "resumed", "finished"]


SCENARIOS: dict[str, tuple[str, Callable[[Training], list[str]]]] = {
    "limit": ("ddp", time_limit),
    "requeue": ("deepspeed_2", requeued_by_hand),
    "down": ("deepspeed_2", node_down),
    "killed": ("ddp", killed),
    "stopped": ("deepspeed_2", stopped),
}


def play(cluster: Cluster, folder: Path, name: str) -> tuple[Training, list[str]]:
    strategy, disturb = SCENARIOS[name]
    pace = 1.0 if name == "limit" else 0.15  # SLURM looks at the time limits each half minute
    overrides = [*OVERRIDES, *PACED, f"+callbacks.pace.seconds={pace}", f"strategy={strategy}"]
    training = Training(cluster, folder, name, *overrides, options=("--signal=USR1@20",))
    return training, disturb(training)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def played(cluster: Cluster, folder: Path) -> Iterator[dict[str, Future[tuple[Training, list[str]]]]]:
    """All of them at the same time, as far as there are nodes: they wait more than they compute."""
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {name: pool.submit(play, cluster, folder, name) for name in SCENARIOS}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, played: object) -> Path:
    """The same runs as two processes of this machine, without SLURM; made while the cluster starts."""
    for strategy in ("ddp", "deepspeed_2"):
        named = [f"run.root={folder}", f"run.name={strategy}", f"strategy={strategy}"]
        train_ranks([*OVERRIDES, *named], 2)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_ends_with_the_same_weights(
    name: str, undisturbed: Path, played: dict[str, Future[tuple[Training, list[str]]]]
) -> None:
    training, expected = played[name].result()
    assert training.end() == "COMPLETED", training.output()
    strategy, _ = SCENARIOS[name]
    assert losses(training.run) == losses(undisturbed / strategy), training.output()
    assert len(losses(training.run)) == STEPS
    assert same_weights(training.run, undisturbed / strategy)
    story = training.story()
    if "…" in expected:  # what came through before SLURM ended the processes
        assert (story[0], story[-2:]) == (expected[0], expected[-2:]), story
    else:
        assert story == expected, training.output()
    resumed = next(row for row in training.events() if row["event"] == "resumed")
    assert resumed["steps_lost"] <= 20 + 1
    assert resumed["tokens"] == resumed["step"] * 128
    assert "Restarts=1" in training.cluster.run("scontrol", "show", "job", training.job)
    logs = sorted(path.name.split("_")[1] for path in (training.run / "logs").iterdir())
    assert {"0000", "0001"} == set(logs)


def test_a_run_that_fails_at_the_same_step_each_time_ends(cluster: Cluster, folder: Path) -> None:
    """After the third time, with the reason that the failing rank had."""
    crash = ["+callbacks.crash._target_=tests.slurm.pace.Crash", "+callbacks.crash.step=9", "+callbacks.crash.rank=1"]
    training = Training(cluster, folder, "crash", *OVERRIDES, "packages=[tests]", *crash, "cluster.preflight=120")
    assert training.end() == "FAILED"
    assert cluster.job(training.job)["ExitCode"] == "6:0", training.output()
    assert training.story() == ["started", "failed", "started", "failed", "started", "failed", "given_up"]
    reasons = [row["reason"] for row in training.events() if row["event"] in ("failed", "given_up")]
    assert any("RuntimeError: a planted error" in reason for reason in reasons), reasons
    assert f"{training.run} has failed 3 times at step 9" in training.output()
    (log,) = (training.run / "logs").glob("rank_0001_*.log")
    assert log.read_text().count("a planted error") >= 3
