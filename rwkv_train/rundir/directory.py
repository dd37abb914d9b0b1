"""The directory of a run: named after the run, used by one process group at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from rwkv_train.errors import UserError
from rwkv_train.file_lock import lock
from rwkv_train.json_files import load_object, reason_of
from rwkv_train.rundir.attempts import Attempts
from rwkv_train.rundir.jsonl import Events, JsonLines, MergedView
from rwkv_train.user_path import user_path


@dataclass(frozen=True)
class PassedOver:
    """What the rewinds of a run have left out.

    Attributes:
        rewinds: their number.
        skipped: (first token, tokens) of each range that is passed over, in the data's order.
        note: what was wrong with the file; None: nothing.
    """

    rewinds: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    note: str | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> PassedOver:
        """What passed_over.json or a "rewound" event says.

        Raises:
            ValueError: it says nothing of the kind.
        """
        rewinds, skipped = found.get("rewinds"), found.get("skipped")
        if type(rewinds) is not int or rewinds < 0 or not isinstance(skipped, list):
            raise ValueError("it lacks rewinds or skipped")
        for span in skipped:
            if not isinstance(span, list) or len(span) != 2 or any(type(n) is not int or n < 0 for n in span):
                raise ValueError("a range of skipped is not two counts of tokens")
        return cls(rewinds, tuple((first, tokens) for first, tokens in skipped))

    def as_json(self) -> dict[str, Any]:
        return {"rewinds": self.rewinds, "skipped": [list(span) for span in self.skipped]}


class RunDirectory:
    """`<root>/<name>/`: config.yaml, metrics.jsonl, events.jsonl, checkpoints/, loss.png, samples.txt, weights.pth.

    With data.tokenizer=bpe:SIZE also tokenizer.json. metrics.jsonl and events.jsonl are merged from attempts/, which
    has a directory for each start of the run.
    """

    def __init__(self, root: str, name: str) -> None:
        self.path = user_path(root) / name
        self.config = self.path / "config.yaml"
        self.tokenizer = self.path / "tokenizer.json"  # of data.tokenizer=bpe:SIZE
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.curve = self.path / "loss.png"
        self.samples = self.path / "samples.txt"
        self.weights = self.path / "weights.pth"
        self.passed_over = self.path / "passed_over.json"  # steps of data that a rewind has skipped
        self.logs = self.path / "logs"
        self.attempts = Attempts(self.path)
        self.number = 0  # of this attempt, once it is claimed

    def claim_attempt(self) -> int:
        """Takes the number of this attempt; its files are written to the attempt's own directory from now on."""
        self.number = self.attempts.claim()
        return self.number

    def read_passed_over(self) -> PassedOver:
        """How often the run was rewound, and which data it passes over.

        If the file cannot be read, it is that of the run's last "rewound" event, which says the same.

        Raises:
            UserError: the file is of an earlier version.
        """
        try:
            found = load_object(self.passed_over)
            if "skips" in found:
                what = f"{self.passed_over} is of an earlier version: it counts steps"
                raise UserError(what, "run.name=NEW init.weights=CHECKPOINT starts a new run from the weights")
            return PassedOver.of(found)
        except FileNotFoundError:
            return PassedOver()
        except (OSError, ValueError) as error:
            reason = reason_of(error)
        rewound = [record.row for record in self.attempts.events() if record.row["event"] == "rewound"]
        for row in reversed(rewound):
            with contextlib.suppress(ValueError):
                note = f"{self.passed_over} cannot be read ({reason}): taken from the last rewind in events.jsonl"
                return replace(PassedOver.of(row), note=note)
        note = f"{self.passed_over} cannot be read ({reason}), and no rewind is recorded: no data is passed over"
        return PassedOver(note=note)

    @contextmanager
    def atomic_write(self, path: Path) -> Iterator[Path]:
        """A path among this attempt's own files for the block to write; it is renamed to `path` after the block."""
        own = self.attempts.directory(self.number) / path.name
        try:
            yield own
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)

    @contextmanager
    def records(
        self, number: int, enabled: bool, tokens: Callable[[int], int] = lambda step: 0
    ) -> Iterator[tuple[Events, JsonLines]]:
        """Events and metrics of one attempt, with merged views of all attempts that are kept up to date.

        Args:
            number: of the attempt.
            enabled: whether this process writes them.
            tokens: trained on after a step, for the events.
        """
        attempts, own = self.attempts, self.attempts.directory(number)
        events = MergedView(self.events, number, attempts, attempts.events)
        metrics = MergedView(self.metrics, number, attempts, attempts.metrics, attempts.copy_metrics)
        records = (
            Events(own / "events.jsonl", enabled, events, tokens),
            JsonLines(own / "metrics.jsonl", enabled, metrics),
        )
        with closing(records[1]), closing(records[0]):  # each, even where the other's last merge fails
            for record in records:
                record.refresh()
            yield records

    def refuse_unusable(self, job: str | None = None) -> None:
        """Raises the UserErrors of `claimed` without creating or changing anything.

        Args:
            job: as for `claimed`.
        """
        nearest = next(path for path in [self.path, *self.path.absolute().parents] if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            why = "it is a file" if nearest.is_file() else f"{nearest} is read-only"
            raise UserError(f"the run directory {self.path} cannot be written: {why}", "run.root=DIR puts it elsewhere")
        lock = self.path / ".lock"
        if lock.exists():
            with open(lock, "r+", encoding="utf-8") as file:
                _lock(file, self.path, job)

    @contextmanager
    def claimed(self, first: bool, job: str | None = None) -> Iterator[None]:
        """Creates the directory and locks it for this process until the block or the process ends.

        Args:
            first: whether this is rank 0; the other ranks rely on its lock.
            job: number of the SLURM job. A lock of the same job does not count: it belongs to an earlier attempt on a
                node that the cluster has given up, and what that still writes does not count either (attempts.py).

        Raises:
            UserError: the directory is in use by another process, or cannot be written.
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
            _lock(lock, self.path, job)
            with contextlib.suppress(OSError):  # a full disk: the lock holds, it only does not name its owner
                os.truncate(lock.fileno(), 0)
                os.write(lock.fileno(), f"pid {os.getpid()} on {os.uname().nodename}{_mark(job)}".encode())
            yield


def _lock(file: TextIO, path: Path, job: str | None) -> None:
    """Raises a UserError if another process holds the lock, unless that is of the same job."""
    if lock(file):
        return
    file.seek(0)
    owner = file.read().strip()
    if not (job and owner.endswith(_mark(job))):
        raise UserError(
            f"the run directory {path} is in use by another process ({owner or 'unknown'})",
            "wait for it, stop it, or give this run another name: run.name=NAME",
        )


def _mark(job: str | None) -> str:
    return f", job {job}" if job else ""
