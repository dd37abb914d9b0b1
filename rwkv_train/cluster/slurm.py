"""What a job asks of SLURM's controller: how much time it has left, and to be put back into the queue."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from datetime import datetime

_PATIENCE = 30.0  # seconds for an answer of the controller's


@dataclass(frozen=True)
class Job:
    """The job that this process is part of.

    Args:
        number: SLURM's, 17, or 17_3 for a task of an array.
        command: puts it back into the queue; its number is appended. None: nothing does.
    """

    number: str
    command: str | None = "scontrol requeue"

    def seconds_left(self) -> float | None:
        """Until SLURM ends the job: at its time limit, or at the end of the grace of a preemption. None: not known."""
        try:
            return (datetime.fromisoformat(self._told().get("EndTime", "")) - datetime.now()).total_seconds()
        except ValueError:  # Unknown
            return None

    def why_not(self) -> str | None:
        """Why the job is not to be put back; None: it is. A job that its user has cancelled stays cancelled."""
        if self.command is None:
            return "cluster.requeue=null"
        told = self._told()
        if told.get("BatchFlag") == "0":
            return f"job {self.number} has no batch script: sbatch starts jobs that can come back"
        state = told.get("JobState", "RUNNING")
        return None if state in ("RUNNING", "SIGNALING") else f"job {self.number} is {state}"

    def requeue(self) -> str | None:
        """Puts the job back, once; SLURM ends its processes upon that, this one among them.

        Returns:
            why that failed; None: it did not.
        """
        assert self.command is not None
        try:
            done = subprocess.run(
                [*shlex.split(self.command), self.number],
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{self.command} {self.number}: {error}"
        said = " ".join((done.stderr or done.stdout).split())
        return (
            None if done.returncode == 0 else f"{self.command} {self.number}: {said or f'exit code {done.returncode}'}"
        )

    def _told(self) -> dict[str, str]:
        """What the controller says of the job; empty where it does not answer."""
        command = ["scontrol", "show", "job", "--oneliner", self.number]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        pairs = (word.partition("=") for word in done.stdout.split())
        told: dict[str, str] = {}
        for name, equals, value in pairs:
            if equals:
                told.setdefault(name, value)
        return told
