"""How jobs begin: sweeps, more nodes than sbatch was given, and users' errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, losses, same_weights, train_ranks
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SCRIPT, Training, wait_until
from tests.slurm.test_runs import OVERRIDES, STEPS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

THREE_STEPS = [
    *(override for override in OVERRIDES if not override.startswith("budget.")),
    "budget.steps=3",
    "cluster.preflight=120",
]


def run(cluster: Cluster, *command: str, code: int, seconds: float = 200) -> str:
    """What a command prints that must end with this exit code."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def train(*overrides: str) -> list[str]:
    return [sys.executable, "train.py", *THREE_STEPS, *overrides]


def one_message(printed: str) -> str:
    """The one error that a user sees."""
    assert len(re.findall(r"^error: ", printed, re.MULTILINE)) == 1, printed
    assert "Traceback" not in printed
    return printed


def test_a_sweep_of_two_by_two(cluster: Cluster, tmp_path: Path) -> None:
    """Submits and ends; four directories, each the run that the same settings give without SLURM."""
    sweep = [f"run.root={tmp_path}/runs", "launcher=slurm", "launcher.timeout_min=30", "launcher.cpus_per_task=1"]
    printed = run(cluster, *train("-m", *sweep, "model=nano,small", "optim.lr=1e-3,2e-3"), code=0)
    jobs = re.findall(r"^job (\S+)  (\S+)  ", printed, re.MULTILINE)
    assert len({job for job, _ in jobs}) == len({path for _, path in jobs}) == 4
    wait_until(lambda: all_done(jobs), "the sweep")
    outputs = "".join(path.read_text() for path in tmp_path.glob("runs/.submitit/*/*_log.*"))
    for _, path in jobs:
        assert len(losses(Path(path))) == 3, outputs
        assert (Path(path) / "weights.pth").exists()
    command = re.search(r"rwkv-train status (.+)", printed)
    assert command is not None
    assert set(command[1].split()) == {path for _, path in jobs}
    shown = run(cluster, sys.executable, "-m", "rwkv_train.cli.main", "status", *command[1].split(), code=0)
    assert shown.count("finished") == 4
    assert len([path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]) == 4


def all_done(jobs: list[tuple[str, str]]) -> bool:
    return all((Path(path) / "weights.pth").exists() for _, path in jobs)


def test_more_nodes_than_sbatch_was_given(cluster: Cluster, tmp_path: Path) -> None:
    """`sbatch train.sbatch trainer.num_nodes=2` is all that a user types."""
    first = Training(cluster, tmp_path, "more", *THREE_STEPS, "trainer.num_nodes=2", options=("--nodes=1",))
    assert first.end() == "COMPLETED"
    again = re.search(r"trainer.num_nodes=2: submitted again with --nodes=2 as job (\d+)", first.output())
    assert again is not None
    wait_until(lambda: cluster.job(again[1])["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the second job")
    second = cluster.job(again[1])
    assert second["JobState"] == "COMPLETED", first.output()
    assert (second["NumNodes"], second["TimeLimit"], second["JobName"]) == ("2", "00:10:00", "more")
    assert len(losses(tmp_path / "more")) == 3
    (ROOT / f"slurm-more-{again[1]}.log").unlink()  # the script's own choice, for the first job's was the test's


def test_srun_in_a_shell_is_no_interactive_job(cluster: Cluster, tmp_path: Path) -> None:
    """Lightning goes by the job's name, which is bash here, and starts two first ranks."""
    named = [f"run.root={tmp_path}", "run.name=shell", f"budget.steps={STEPS}", "trainer.num_nodes=2"]
    command = " ".join(train(*(override for override in named)))
    printed = run(cluster, "srun", "--nodes=2", "--time=5", "bash", "-c", command, code=0)
    assert "nodes   2 nodes, 2 processes agree" in printed
    train_ranks([*OVERRIDES, f"run.root={tmp_path}", "run.name=plain"], 2)
    assert same_weights(tmp_path / "shell", tmp_path / "plain")


def test_nodes_that_the_job_does_not_have(cluster: Cluster, tmp_path: Path) -> None:
    training = Training(cluster, tmp_path, "wrong", *THREE_STEPS, "trainer.num_nodes=4")
    assert training.end() == "FAILED"
    printed = one_message(training.output())
    assert re.search(r"error: trainer.num_nodes=4, and the job has 2 nodes \(n\d, n\d\)\n", printed)
    job = cluster.job(training.job)
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        (
            ["--nodes=2"],
            ["trainer.num_nodes=2", "trainer.devices=2"],
            "trainer.devices=2, and srun starts 1 processes a",
        ),
        (["--nodes=2"], ["trainer.num_nodes=2", "modle=7b"], "modle=7b: there is no modle"),
    ],
)
def test_mistakes_of_a_step(
    cluster: Cluster, tmp_path: Path, options: list[str], overrides: list[str], message: str
) -> None:
    command = ["srun", *options, "--time=5", "--kill-on-bad-exit=1", *train(f"run.root={tmp_path}", *overrides)]
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert message in one_message(done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_run_directory_that_is_not_shared(cluster: Cluster, tmp_path: Path) -> None:
    """Each node has a file system of its own there."""
    root = tmp_path / "local"
    root.mkdir()
    own = f"mount -t tmpfs none {root} && exec {' '.join(train(f'run.root={root}', 'trainer.num_nodes=2'))}"
    command = ["srun", "--nodes=2", "--time=5", "--kill-on-bad-exit=1", "unshare", "--mount", "bash", "-c", own]
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    printed = one_message(done.stderr)
    assert re.search(
        r"the run directory is not shared: node n\d does not see what the first node writes there", printed
    )


def test_srun_is_missing(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"cd {ROOT} && {' '.join(train(f'run.root={tmp_path}', 'trainer.num_nodes=2'))}"
    command = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--time=5",
        f"--output={log}",
        f"--wrap={script}",
    ]
    job = cluster.run(*command).strip()
    wait_until(lambda: cluster.job(job)["JobState"] == "FAILED", "the job's end")
    assert f"error: job {job} has 2 tasks on 2 nodes, and this process was started without srun" in one_message(
        log.read_text()
    )
    assert cluster.job(job)["ExitCode"] == "2:0"


def test_a_partition_that_is_not_there(cluster: Cluster, tmp_path: Path) -> None:
    printed = run(cluster, "sbatch", "--partition=nope", str(SCRIPT), code=1)
    assert "invalid partition" in printed
    overrides = [f"run.root={tmp_path}", "launcher=slurm", "launcher.partition=nope"]
    printed = one_message(run(cluster, *train(*overrides), code=2))
    assert "invalid partition specified: nope" in printed
    printed = one_message(
        run(cluster, *train(f"run.root={tmp_path}", "launcher=slurm", "launcher.partitions=x"), code=2)
    )
    assert "launcher.partitions: there is no such setting\n  nearest: partition; valid: account, " in printed
