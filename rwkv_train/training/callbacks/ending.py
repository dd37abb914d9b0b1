"""Ends a run at its last step or when its time is up; the last step is validated either way."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class StopAtBudget(Callback):
    """Asks Lightning to stop after a step; Lightning then validates, even where no validation is due.

    Lightning's own Timer cannot be used: in a resumed run it continues to count where it was, and stops at once.

    Args:
        total: the last step of the run; None: no limit.
        seconds: time limit of this process, from now on; None: no limit.

    Attributes:
        out_of_time: whether the time limit has ended the run.
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
            self.out_of_time = trainer.strategy.broadcast(up)  # rank 0's clock decides
        if last or self.out_of_time:
            trainer.should_stop = True
