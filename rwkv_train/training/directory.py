"""The directory of a run: keyed on the run's name, used by one process group at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from rwkv_train.errors import UserError


class RunDirectory:
    """`<root>/<name>/`: config.yaml, metrics.jsonl, events.jsonl, checkpoints/, loss.png, samples.txt, weights.pth."""

    def __init__(self, root: str, name: str) -> None:
        self.path = Path(root).expanduser() / name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.curve = self.path / "loss.png"
        self.samples = self.path / "samples.txt"
        self.weights = self.path / "weights.pth"
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Makes the directory and keeps it for this process until it ends, however it ends.

        Raises:
            UserError: another process has it, or it cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")
        except OSError as error:
            raise UserError(f"the run directory {self.path} cannot be written: {error.strerror}", "run.root=DIR") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            raise UserError(
                f"the run directory {self.path} is in use by another process ({owner})",
                "wait for it, stop it, or give this run another name: run.name=NAME",
            ) from None
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(f"pid {os.getpid()} on {os.uname().nodename}")
        self._lock.flush()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
