"""Requests to SLURM's controller: the time that a job has left, and to requeue it."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from datetime import datetime

CONTROLLER_TIMEOUT = 30.0  # seconds for an answer of the controller


@dataclass(frozen=True)
class Job:
    """The job that this process is part of.

    Args:
        number: SLURM's job ID: 17, or 17_3 for a task of an array.
        command: the shell command that requeues it, to which the ID is appended; None: never.
    """

    number: str
    command: str | None = "scontrol requeue"

    def seconds_left(self) -> float | None:
        """Seconds until SLURM ends the job: its time limit, or the grace period of a preemption; None: unknown."""
        try:
            end = datetime.fromisoformat(self._controller_facts().get("EndTime", ""))
            return (end - datetime.now()).total_seconds()
        except ValueError:  # Unknown
            return None

    def why_not(self) -> str | None:
        """Why the job must not be requeued; None: it may be. A job that its user has cancelled stays cancelled."""
        if self.command is None:
            return "cluster.requeue=null"
        facts = self._controller_facts()
        if facts.get("BatchFlag") == "0":
            return f"job {self.number} has no batch script: sbatch starts jobs that can come back"
        state = facts.get("JobState", "RUNNING")
        return None if state in ("RUNNING", "SIGNALING") else f"job {self.number} is {state}"

    def requeue(self) -> str | None:
        """Requeues the job, upon which SLURM ends its processes, this one among them.

        Returns:
            why it failed; None: it succeeded.
        """
        assert self.command is not None
        try:
            done = subprocess.run(
                [*shlex.split(self.command), self.number],
                capture_output=True,
                text=True,
                timeout=CONTROLLER_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{self.command} {self.number}: {error}"
        output = " ".join((done.stderr or done.stdout).split())
        if done.returncode == 0:
            return None
        return f"{self.command} {self.number}: {output or f'exit code {done.returncode}'}"

    def _controller_facts(self) -> dict[str, str]:
        """The fields of `scontrol show job`; empty where the controller does not answer."""
        command = ["scontrol", "show", "job", "--oneliner", self.number]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CONTROLLER_TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        pairs = (field.partition("=") for field in done.stdout.split())
        facts: dict[str, str] = {}
        for name, equals, value in pairs:
            if equals:
                facts.setdefault(name, value)
        return facts
