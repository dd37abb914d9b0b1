"""The directory of a run: keyed on the run's name, used by one process group at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rwkv_train.errors import UserError
from rwkv_train.rundir.attempts import Attempts
from rwkv_train.rundir.jsonl import Events, JsonLines, Shown


class RunDirectory:
    """`<root>/<name>/`: config.yaml, metrics.jsonl, events.jsonl, checkpoints/, loss.png, samples.txt, weights.pth.

    metrics.jsonl and events.jsonl are the merge of what stands in attempts/, a folder for each start of the run.
    """

    def __init__(self, root: str, name: str) -> None:
        self.path = Path(root).expanduser() / name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.curve = self.path / "loss.png"
        self.samples = self.path / "samples.txt"
        self.weights = self.path / "weights.pth"
        self.passed_over = self.path / "passed_over.json"  # data that the run has rewound behind
        self.logs = self.path / "logs"
        self.attempts = Attempts(self.path)
        self.number = 0  # of this start, once it has one

    def claim_attempt(self) -> int:
        """Takes the number of this start; its files are written in the attempt's own folder from now on."""
        self.number = self.attempts.claim()
        return self.number

    @contextmanager
    def atomic_write(self, path: Path) -> Iterator[Path]:
        """Where the block writes a file of the run, among this start's own; behind the block it gets its name."""
        own = self.attempts.directory(self.number) / path.name
        try:
            yield own
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)

    @contextmanager
    def records(self, number: int, enabled: bool, tokens_per_step: int = 0) -> Iterator[tuple[Events, JsonLines]]:
        """Events and metrics of one attempt; their merges with those before it are made anew, and follow."""
        starts, own = self.attempts, self.attempts.directory(number)
        events = Shown(self.events, number, starts, starts.events)
        metrics = Shown(self.metrics, number, starts, starts.metrics)
        found = (
            Events(own / "events.jsonl", enabled, events, tokens_per_step),
            JsonLines(own / "metrics.jsonl", enabled, metrics),
        )
        try:
            for record in found:
                record.show()
            yield found
        finally:
            for record in found:
                record.close()

    def refuse_unusable(self) -> None:
        """Raises the UserErrors of `claimed` without making or changing anything."""
        there = next(path for path in [self.path, *self.path.absolute().parents] if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "it is a file" if there.is_file() else f"{there} is read-only"
            raise UserError(f"the run directory {self.path} cannot be written: {why}", "run.root=DIR puts it elsewhere")
        lock = self.path / ".lock"
        if lock.exists():
            with open(lock, encoding="utf-8") as file:
                _lock(file, self.path)

    @contextmanager
    def claimed(self, first: bool, job: str | None = None) -> Iterator[None]:
        """Makes the directory and keeps it for this process until the block or the process ends, however it ends.

        Args:
            first: whether this is the run's first process; the others use what it has claimed.
            job: SLURM's number; an earlier start of the same job, which a dead node has left behind, is no hindrance:
                what it still writes does not count (attempts.py).

        Raises:
            UserError: another process has it, or it cannot be written.
        """
        if not first:
            yield
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  the `with` below closes it
        except OSError as error:
            what = f"the run directory {self.path} cannot be written: {error.strerror}"
            raise UserError(what, "run.root=DIR puts it elsewhere") from None
        with lock:
            mark = f", job {job}" if job else ""
            try:
                _lock(lock, self.path)
            except UserError:
                lock.seek(0)
                if not mark or not lock.read().strip().endswith(mark):
                    raise
            with contextlib.suppress(OSError):  # a full disk: the claim holds, it only has no name
                os.truncate(lock.fileno(), 0)
                os.write(lock.fileno(), f"pid {os.getpid()} on {os.uname().nodename}{mark}".encode())
            yield


def _lock(file: TextIO, path: Path) -> None:
    """Raises a UserError where another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(
            f"the run directory {path} is in use by another process ({file.read().strip() or 'unknown'})",
            "wait for it, stop it, or give this run another name: run.name=NAME",
        ) from None
