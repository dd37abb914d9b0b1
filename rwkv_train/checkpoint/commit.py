"""The commit protocol of a save: the manifest names one attempt and one step, and follows every rank's checksums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Entries = Mapping[str, Any]  # file name → {"bytes", "sha256"}


@dataclass(frozen=True)
class Ack:
    """A rank's message to rank 0 when its part of a save has ended.

    Attributes:
        attempt: number of the attempt that saves.
        step: step of the checkpoint.
        rank: the sender.
        files: size and checksum of each file that the rank has written.
        error: why the rank could not write its files; None if it could.
        index: what is in its files: kind → name → [first element, number of elements]; None: it is not known.
    """

    attempt: int
    step: int
    rank: int
    files: Entries
    error: str | None = None
    index: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Commit:
    """Rank 0's side of one save: collects the acks of all writing ranks; only then is there a manifest to write.

    Args:
        attempt: number of the attempt that saves.
        step: step of the checkpoint.
        writers: number of ranks that write files; they are the first ones.
    """

    def __init__(self, attempt: int, step: int, writers: int) -> None:
        self.attempt, self.step, self.writers = attempt, step, writers
        self._acks: dict[int, Ack] = {}

    def receive(self, ack: Ack) -> None:
        """Takes an ack; one of another save or another attempt is ignored."""
        if (ack.attempt, ack.step) == (self.attempt, self.step) and ack.rank < self.writers:
            self._acks[ack.rank] = ack

    @property
    def missing(self) -> list[int]:
        """Ranks whose ack has not come yet."""
        return [rank for rank in range(self.writers) if rank not in self._acks]

    @property
    def error(self) -> str | None:
        """Why this save cannot become a checkpoint; None if no rank has failed so far."""
        failed = (f"rank {rank}: {ack.error}" for rank, ack in sorted(self._acks.items()) if ack.error is not None)
        return next(failed, None)

    def index(self) -> dict[str, dict[str, list[list[int]]]] | None:
        """The content of the index: kind → name → [[writer, start, count], …]; None: a rank has sent no part."""
        found: dict[str, dict[str, list[list[int]]]] = {}
        for rank, ack in sorted(self._acks.items()):
            if ack.index is None:
                return None
            for kind, names in ack.index.items():
                for name, (start, count) in names.items():
                    found.setdefault(kind, {}).setdefault(name, []).append([rank, start, count])
        return found

    def manifest(self, more: Entries) -> dict[str, Any]:
        """The content of the manifest.

        Args:
            more: further files that rank 0 has written.

        Raises:
            RuntimeError: the ack of a rank is missing, or a rank could not write.
        """
        if self.missing or self.error is not None:
            raise RuntimeError(self.error or f"no ack from the ranks {self.missing}")
        files = {name: entry for ack in self._acks.values() for name, entry in ack.files.items()}
        return {"attempt": self.attempt, "step": self.step, "files": {**files, **more}}
