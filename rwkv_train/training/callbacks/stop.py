"""Signals: the step is finished, a checkpoint written, and the run ends so that it can be resumed."""

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

# signals of preemption and time limits: from scancel and Kubernetes, from SLURM's --signal, from submitit, and from a
# terminal that closes
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopOnSignal(Callback):
    """Asks Lightning to stop after the step in which any rank received a signal; CheckpointCallback then saves.

    The handler only sets a flag. The ranks exchange their flags while the next step computes and read the result after
    it: no rank waits for another, and all stop at the same step. A second SIGINT ends the process at once, and the last
    checkpoint is kept.

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
        self._previous: dict[int, Any] = {}
        self._flag: torch.Tensor | None = None
        self._exchange: dist.Work | None = None

    def connect(self, saving: CheckpointCallback) -> None:
        """Sets the callback that saves when the run stops; signals are handled before it exists."""
        self._saving = saving

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
        """Disables Lightning's SIGTERM handler, which broadcasts from inside the handler: the other ranks may not."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(signal.SIGINT)  # before this it ends the process: there is no step to finish

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        number = self._agreed(trainer)
        if not number or self.stopped:
            return
        self.stopped = signal.Signals(number).name
        trainer.should_stop = True
        self._decide_last_save(trainer)
        if (batch_idx + 1) % (trainer.val_check_batch or 1):
            trainer.limit_val_batches = 0  # else Lightning validates where it stops, and time is short

    def _agreed(self, trainer: L.Trainer) -> int:
        """The signal that any rank had received when the flags were last exchanged; 0: none."""
        if trainer.world_size == 1:
            return int(self.received or 0)
        agreed = 0
        if self._exchange is not None and self._flag is not None:
            self._exchange.wait()
            agreed = int(self._flag.item())
        self._flag = torch.tensor(int(self.received or 0), device=trainer.strategy.root_device)
        self._exchange = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)
        return agreed

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

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._exchange is not None and not trainer.interrupted and trainer.state.finished:
            self._exchange.wait()


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
