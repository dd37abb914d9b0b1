"""Which checkpoints of a run are deleted after a save: those that are not to be kept, and those that no longer count.

Nothing is deleted through a symbolic link, and no link is removed: someone has moved that checkpoint elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rwkv_train.checkpoint.directory import unusable
from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.storage import Storage
from rwkv_train.config import CheckpointSettings
from rwkv_train.errors import UserError
from rwkv_train.rundir.attempts import Attempts, Lineage


def checkpoints_to_keep(losses: Mapping[int, float | None], keep: int, permanent: int | None, best: bool) -> set[int]:
    """The steps whose checkpoints are kept.

    Args:
        losses: step → validation loss (None: not validated) of the run's complete checkpoints; one that is not finite
            counts as none.
        keep: how many of the newest are kept.
        permanent: also keep those at multiples of this many steps; None: no further ones.
        best: also keep the one with the lowest validation loss.
    """
    steps = set(sorted(losses)[-keep:])
    if permanent is not None:
        steps |= {step for step in losses if step % permanent == 0}
    validated = [(loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    if best and validated:
        steps.add(min(validated)[1])
    return steps


@dataclass(frozen=True)
class Retention:
    """What is kept of a run's checkpoints.

    Args:
        directory: checkpoints/ of the run.
        attempts: of the run.
        keep, permanent, best: as for `checkpoints_to_keep`.
        storage: the file system.
    """

    directory: Path
    attempts: Attempts
    keep: int
    permanent: int | None
    best: bool
    storage: Storage

    @classmethod
    def of(
        cls, directory: Path, attempts: Attempts, settings: CheckpointSettings, tokens_per_step: int, storage: Storage
    ) -> Retention:
        """That of a run with these settings.

        Args:
            directory, attempts, settings, storage: of the run.
            tokens_per_step: converts a duration that is given in tokens.
        """
        permanent = None if settings.permanent is None else settings.permanent.in_steps(tokens_per_step)
        return cls(directory, attempts, settings.keep, permanent, settings.best, storage)

    def outdated(self, attempt: int) -> list[Path]:
        """The checkpoints of older attempts that do not count from the view of one, oldest first.

        They are later than the checkpoint that a later attempt continued from: after a rewind, a resume from an older
        checkpoint, or damage of the newest ones. Permanent ones, and those of newer attempts, are not among them.
        """
        return self._outdated(attempt, self.attempts.lineage(attempt))

    def superfluous(self, attempt: int) -> list[Path]:
        """What an attempt deletes after a save.

        One that cannot be resumed from is not one of those `keep`; it is deleted once it is older than all of them.
        """
        lineage = self.attempts.lineage(attempt)
        names = [name for name in self._names() if lineage.includes(name.attempt, name.step)]
        counted = {name.step: self.directory / str(name) for name in names}
        newest: list[int] = []
        for step in reversed(counted):
            if len(newest) < self.keep and unusable(counted[step], content=False) is None:
                newest.append(step)
        found = self._outdated(attempt, lineage)
        if len(newest) == self.keep:
            older = [step for step in counted if step < newest[-1]]
            losses = {step: _val_loss(counted[step]) if self.best else None for step in [*older, *newest]}
            kept = checkpoints_to_keep(losses, self.keep, self.permanent, self.best)
            found += [counted[step] for step in older if step not in kept and not counted[step].is_symlink()]
        return found

    def _outdated(self, attempt: int, lineage: Lineage) -> list[Path]:
        return [
            path
            for name in self._names()
            if name.attempt < attempt
            and not lineage.includes(name.attempt, name.step)
            and not (self.permanent and name.step % self.permanent == 0)
            and not (path := self.directory / str(name)).is_symlink()
        ]

    def _names(self) -> list[CheckpointName]:
        return sorted(filter(None, map(CheckpointName.parse, self.storage.names(self.directory))))


def _val_loss(path: Path) -> float | None:
    """The validation loss of a checkpoint; None: it was not validated, or its description cannot be read."""
    try:
        return CheckpointMeta.read(path).val_loss
    except UserError:
        return None
