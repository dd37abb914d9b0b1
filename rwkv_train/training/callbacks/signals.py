"""What SIGTERM, SIGUSR1 and Ctrl-C do: the step is finished, a checkpoint written, and the run ends to be resumed."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED = 130  # exit code of a second Ctrl-C


class Signals(Callback):
    """Asks Lightning to stop behind the step in which any rank got a signal; what then saves is Checkpointing.

    A handler only sets a flag. The ranks exchange their flags while the next step computes and read them behind it, so
    that nobody waits for anybody and all stop at the same step. A second SIGINT leaves at once, without a word to
    anybody: the checkpoint that is there stays.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # the signal that this process got
        self.stopped = False  # whether the run ended because of one
        self._before: dict[int, Any] = {}
        self._flag: torch.Tensor | None = None
        self._exchange: dist.Work | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """By now Lightning has put its own handlers in, which would end the run by an exception."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            os._exit(INTERRUPTED)
        self.received = signal.Signals(number).name

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._agreed(trainer):
            self.stopped = trainer.should_stop = True
            if (batch_idx + 1) % (trainer.val_check_batch or 1):
                trainer.limit_val_batches = 0  # Lightning would validate where it stops, and time is short

    def _agreed(self, trainer: L.Trainer) -> bool:
        """Whether a signal had come to any rank when the flags were exchanged last."""
        if trainer.world_size == 1:
            return self.received is not None
        came = False
        if self._exchange is not None and self._flag is not None:
            self._exchange.wait()
            came = bool(self._flag.item())
        self._flag = torch.tensor(float(self.received is not None), device=trainer.strategy.root_device)
        self._exchange = dist.all_reduce(self._flag, async_op=True)
        return came

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._exchange is not None and not trainer.interrupted and trainer.state.finished:
            self._exchange.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def follow_parent() -> None:
    """Ends this process when the one that started it has ended: a collective would wait for it for half an hour."""
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, name="parent", daemon=True).start()
