"""When a run ends: with its last step, or when its time is up. Either way the last step is validated."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class StopAtBudget(Callback):
    """Asks Lightning to stop behind a step; Lightning then validates there, though no validation is due.

    Lightning's own Timer is no help: it goes on counting where a resumed run was stopped, which stops it again at once.

    Args:
        total: the last step of the run; None: no end.
        seconds: of this process, from now on; None: no limit.
    """

    def __init__(self, total: int | None, seconds: float | None) -> None:
        self.total, self.seconds = total, seconds
        self.out_of_time = False
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        last = trainer.global_step == self.total
        if self.seconds is not None and not last:
            up = time.monotonic() - self._began >= self.seconds
            self.out_of_time = trainer.strategy.broadcast(up)  # the first rank's clock is everybody's
        if last or self.out_of_time:
            trainer.should_stop = True
