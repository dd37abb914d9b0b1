"""The end of a run after a step, on all ranks: a signal, with a checkpoint to resume from; the budget."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from rwkv_train.exit_codes import ExitCode
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback
from rwkv_train.training.callbacks.metrics import Metrics
from rwkv_train.training.module import RWKVModule

# signals of preemption and time limits: from scancel and Kubernetes, from SLURM's --signal, from submitit, and from a
# terminal that closes
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def ask_all_to_stop(pl_module: L.LightningModule) -> None:
    """Lets the ranks stop: the request is summed over them with the loss of this step, or of the next one."""
    assert isinstance(pl_module, RWKVModule)
    pl_module.verdict.ask_to_stop()


def reason_to_stop(trainer: L.Trainer, metrics: Metrics, reason: int) -> int:
    """The largest reason that any rank has to stop after this step; 0: none has one that all know of.

    Called by all ranks after each step. It costs a collective only after `ask_all_to_stop`: until the row of a step
    in which a rank has asked is written, which is at the same step on all ranks, each rank answers by itself. With
    several ranks a run stops at most two steps after the one in which there was a reason, on GPUs three.

    Args:
        trainer: of the run.
        metrics: writes the rows.
        reason: this rank's own; 0: it has none.
    """
    if trainer.world_size == 1:
        return reason
    if not metrics.stop_asked:
        return 0
    largest = torch.tensor(reason, device=trainer.strategy.root_device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


class StopOnSignal(Callback):
    """Asks Lightning to stop after a step if any rank has received a signal; CheckpointCallback then saves.

    The handler only sets a flag. No rank waits for another, and all stop at the same step (`reason_to_stop`). A second
    SIGINT ends the process at once, and the last checkpoint is kept.

    Args:
        seconds_left: returns the time until this process is killed, asked after a signal; None: not known.

    Attributes:
        received: the signal that this process has received.
        stopped: the signal that has ended the run, the same on all ranks.
        too_late: why no checkpoint was written at the end; None: one was.
    """

    def __init__(self, seconds_left: Callable[[], float | None] = lambda: None) -> None:
        self.seconds_left = seconds_left
        self.received: signal.Signals | None = None
        self.stopped: str | None = None
        self.too_late: str | None = None
        self._saving: CheckpointCallback | None = None
        self._metrics: Metrics | None = None
        self._previous: dict[int, Any] = {}

    def connect(self, saving: CheckpointCallback, metrics: Metrics) -> None:
        """Sets what saves when the run stops, and what writes the rows; signals are handled before they exist."""
        self._saving, self._metrics = saving, metrics

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Signals during the block do not kill the process, also before the first step and after the last one."""
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._listen(*(number for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)))
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous = {}

    def _listen(self, *numbers: signal.Signals) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous.update({number: signal.signal(number, self._handle) for number in numbers})

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(ExitCode.INTERRUPTED)
        self.received = signal.Signals(number)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Disables Lightning's SIGTERM handler, which broadcasts from inside the handler: the other ranks may not.

        And its broadcast before each pass of whether there was one, which makes the host wait for the device.
        """
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(signal.SIGINT)  # before this it ends the process: there is no step to finish

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        if self.received:
            ask_all_to_stop(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert self._metrics is not None
        number = reason_to_stop(trainer, self._metrics, int(self.received or 0))
        if not number or self.stopped:
            return
        self.stopped = signal.Signals(number).name
        trainer.should_stop = True
        self._decide_last_save(trainer)
        if (batch_idx + 1) % (trainer.val_check_batch or 1):
            trainer.limit_val_batches = 0  # else Lightning validates where it stops, and time is short

    def _decide_last_save(self, trainer: L.Trainer) -> None:
        """Omits the last checkpoint if there is less time left than the previous one took."""
        left = self.seconds_left() if trainer.is_global_zero and self.stopped != "SIGINT" else None
        if self._saving is None:
            return
        takes = self._saving.takes
        short = left is not None and takes is not None and left < takes
        if trainer.strategy.broadcast(short):
            self._saving.skip_last_save()
            if short:
                self.too_late = f"{max(left or 0, 0):.0f} s are left and a checkpoint takes {takes:.0f} s"


class StopAtBudget(Callback):
    """Asks Lightning to stop after a step; Lightning then validates, even where no validation is due.

    Lightning's own Timer cannot be used: in a resumed run it continues to count where it was, and stops at once.

    Args:
        total: the last step of the run; None: no limit.
        seconds: time limit of this process, from now on; None: no limit. Rank 0's clock decides.
        metrics: writes the rows.

    Attributes:
        out_of_time: whether the time limit has ended the run.
    """

    def __init__(self, total: int | None, seconds: float | None, metrics: Metrics) -> None:
        self.total, self.seconds, self.metrics = total, seconds, metrics
        self.out_of_time = False
        self._began = time.monotonic()

    def _is_over(self, trainer: L.Trainer) -> bool:
        late = self.seconds is not None and time.monotonic() - self._began >= self.seconds
        return late and trainer.is_global_zero

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        if self._is_over(trainer):
            ask_all_to_stop(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        last = trainer.global_step == self.total
        if self.seconds is not None and not last:
            self.out_of_time = bool(reason_to_stop(trainer, self.metrics, int(self._is_over(trainer))))
        if last or self.out_of_time:
            trainer.should_stop = True
