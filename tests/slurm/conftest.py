"""One cluster for all tests of this folder, and a class for a training job on it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, rows
from tests.slurm.cluster import Cluster, install

SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"
NODES = 6  # three jobs of two nodes at a time


def wait_until(holds: Callable[[], Any], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)


class Training:
    """A run that scripts/slurm/train.sbatch trains.

    Args:
        cluster: where.
        folder: run.root.
        name: run.name.
        overrides: of train.py.
        options: of sbatch.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, name: str, *overrides: str, options: tuple[str, ...] = ()
    ) -> None:
        self.cluster, self.run, self.log = cluster, folder / name, folder / f"{name}.log"
        command = ["sbatch", "--parsable", "--nodes=2", f"--job-name={name}", f"--output={self.log}", "--time=10"]
        named = [f"run.root={folder}", f"run.name={name}"]
        self.job = cluster.run(*command, *options, str(SCRIPT), *overrides, *named).strip()

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def state(self) -> str:
        return self.cluster.job(self.job)["JobState"]

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def reach(self, step: int) -> None:
        self.wait(lambda: self.steps() >= step, f"step {step}")

    def wait(self, holds: Callable[[], Any], what: str) -> None:
        """Waits until `holds()` is true, while the job runs."""
        wait_until(lambda: holds() or self.over(), f"{what} of {self.run.name}")
        assert holds(), f"{self.state()}\n{self.output()}"

    def over(self) -> bool:
        return self.state() not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING")

    def end(self, seconds: float = 300) -> str:
        """How the job ended."""
        wait_until(self.over, f"the end of {self.run.name}", seconds)
        return self.state()

    def events(self) -> list[dict[str, Any]]:
        return rows(self.run, "events.jsonl")

    def story(self) -> list[str]:
        """The names of the events without checkpoints; an event that both rank 0 and its monitor report counts once."""
        names = [row["event"] for row in self.events() if row["event"] not in ("checkpoint", "straggler")]
        return [event for number, event in enumerate(names) if number == 0 or event != names[number - 1]]

    def processes(self) -> dict[int, int]:
        """rank → pid of those that train."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                if b"rwkv_train.cli.main" in arguments and f"run.name={self.run.name}".encode() in arguments:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    named = dict(variable.partition(b"=")[::2] for variable in variables)
                    if b"SLURM_STEP_NUM_TASKS" in named and arguments[0].endswith(b"python"):
                        found[int(named[b"SLURM_PROCID"])] = int(entry.name)
            except OSError:
                continue
        return found


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    install()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds a socket
    folder.chmod(0o755)
    made = Cluster(folder, NODES)
    before = os.environ.get("PATH", "")
    try:
        made.up()
        yield made
    finally:
        made.down()
        os.environ["PATH"] = before
        shutil.rmtree(folder, ignore_errors=True)
