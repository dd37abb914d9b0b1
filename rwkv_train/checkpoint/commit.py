"""When a checkpoint counts: its marker names one attempt and one step, and comes after every rank's checksums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Entries = Mapping[str, Any]  # file name → {"bytes", "sha256"}


@dataclass(frozen=True)
class Word:
    """What a rank tells the first one about its files: their checksums, or why there are none."""

    attempt: int
    step: int
    rank: int
    files: Entries
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Commit:
    """The first rank's side of one save: it hears every rank, and only then there is a marker to write.

    Args:
        attempt: that saves.
        step: of the checkpoint.
        writers: ranks that write files, the first ones.
    """

    def __init__(self, attempt: int, step: int, writers: int) -> None:
        self.attempt, self.step, self.writers = attempt, step, writers
        self._heard: dict[int, Word] = {}

    def hear(self, word: Word) -> None:
        """A word of another save or another attempt is none of ours."""
        if (word.attempt, word.step) == (self.attempt, self.step) and word.rank < self.writers:
            self._heard[word.rank] = word

    @property
    def missing(self) -> list[int]:
        """Ranks that have not been heard."""
        return [rank for rank in range(self.writers) if rank not in self._heard]

    @property
    def error(self) -> str | None:
        """Why this save cannot become a checkpoint; None: nothing speaks against it so far."""
        failed = (f"rank {rank}: {word.error}" for rank, word in sorted(self._heard.items()) if word.error is not None)
        return next(failed, None)

    def marker(self, more: Entries) -> dict[str, Any]:
        """The content of the marker, the first rank's own further files added.

        Raises:
            RuntimeError: a rank has not been heard, or could not write.
        """
        if self.missing or self.error is not None:
            raise RuntimeError(self.error or f"no word from the ranks {self.missing}")
        files = {name: entry for word in self._heard.values() for name, entry in word.files.items()}
        return {"attempt": self.attempt, "step": self.step, "files": {**files, **more}}


def stay(counted: Mapping[int, Any], keep: int, permanent: int | None, best: bool) -> set[int]:
    """The steps whose checkpoints stay.

    Args:
        counted: step → validation loss (None: not validated) of the run's whole checkpoints.
        keep: how many of the newest stay.
        permanent: besides, multiples of so many steps do.
        best: besides, the one with the lowest validation loss does.
    """
    steps = set(sorted(counted)[-keep:])
    if permanent is not None:
        steps |= {step for step in counted if step % permanent == 0}
    if best and (losses := [(loss, step) for step, loss in counted.items() if loss is not None]):
        steps.add(min(losses)[1])
    return steps
