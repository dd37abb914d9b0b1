"""Which checkpoints of a run are deleted after a save: those that are not to be kept, and those that no longer count.

Nothing is deleted through a symbolic link, and no link is removed: someone has moved that checkpoint elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_train.checkpoint.directory import unusable
from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.storage import Storage
from rwkv_train.config import CheckpointSettings, Duration
from rwkv_train.errors import UserError
from rwkv_train.rundir.attempts import Attempts, Lineage


def checkpoints_to_keep(losses: Mapping[int, float | None], keep: int, best: bool) -> set[int]:
    """The steps whose checkpoints are kept, apart from permanent ones.

    Args:
        losses: step → validation loss (None: not validated) of the run's complete checkpoints; one that is not finite
            counts as none.
        keep: how many of the newest are kept.
        best: also keep the one with the lowest validation loss.
    """
    steps = set(sorted(losses)[-keep:])
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
        keep, best: as for `checkpoints_to_keep`.
        permanent: also keep those at multiples of this many steps, or the first one at or after each multiple of this
            many tokens, as each checkpoint records them; None: no further ones.
        storage: the file system.
    """

    directory: Path
    attempts: Attempts
    keep: int
    permanent: Duration | None
    best: bool
    storage: Storage

    @classmethod
    def of(cls, directory: Path, attempts: Attempts, settings: CheckpointSettings, storage: Storage) -> Retention:
        """That of a run with these settings."""
        return cls(directory, attempts, settings.keep, settings.permanent, settings.best, storage)

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
            kept = checkpoints_to_keep(losses, self.keep, self.best) | self._permanent(names)
            found += [counted[step] for step in older if step not in kept and not counted[step].is_symlink()]
        return found

    def _outdated(self, attempt: int, lineage: Lineage) -> list[Path]:
        names = self._names()
        return [
            path
            for name in names
            if name.attempt < attempt
            and not lineage.includes(name.attempt, name.step)
            and not (path := self.directory / str(name)).is_symlink()
            and name.step not in self._permanent(self._before(name, names))
        ]

    def _before(self, last: CheckpointName, names: Sequence[CheckpointName]) -> list[CheckpointName]:
        """The checkpoints that a run which ended with one of them would have."""
        lineage = self.attempts.lineage(last.attempt)
        return [name for name in names if name.step <= last.step and lineage.includes(name.attempt, name.step)]

    def _permanent(self, names: Sequence[CheckpointName]) -> set[int]:
        """The steps of the permanent ones among successive checkpoints.

        Of those between two multiples of `permanent.tokens` only the first is permanent, so that the deletion of the
        others does not change which it is, nor does another batch: the tokens are those that each one records.
        """
        if self.permanent is None:
            return set()
        if self.permanent.steps is not None:
            return {name.step for name in names if name.step % self.permanent.steps == 0}
        assert self.permanent.tokens is not None
        first: dict[int, int] = {}  # multiples of the tokens → step
        for name in names:
            meta = _meta(self.directory / str(name))
            if meta is not None and (multiple := meta.tokens // self.permanent.tokens):
                first.setdefault(multiple, name.step)
        return set(first.values())

    def _names(self) -> list[CheckpointName]:
        return sorted(filter(None, map(CheckpointName.parse, self.storage.names(self.directory))))


def _val_loss(path: Path) -> float | None:
    """The validation loss of a checkpoint; None: it was not validated, or its description cannot be read."""
    meta = _meta(path)
    return None if meta is None else meta.val_loss


def _meta(path: Path) -> CheckpointMeta | None:
    """The description of a checkpoint; None: it cannot be read."""
    try:
        return CheckpointMeta.read(path)
    except UserError:
        return None
