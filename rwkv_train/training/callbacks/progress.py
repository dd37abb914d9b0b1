"""What a person sees while a run goes on: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rwkv_train.training.callbacks.metrics import Metrics
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.throughput import matmul_rate, utilisation

_PLAIN_SECONDS = 15.0  # between two lines where the output is no terminal
_WINDOW = 50  # steps over which the speed is taken


class ProgressBar(Callback):
    """Loss, tokens per second, MFU and time left.

    Args:
        metrics: the callback whose last row is shown.
        total: steps of the whole run; None: no end.
        console: where to; only rank 0 has one.
    """

    def __init__(self, metrics: Metrics, total: int | None, console: Console | None = None) -> None:
        self.metrics, self.total = metrics, total
        self.console = console or Console()
        self._bar: Progress | None = None
        self._ends: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._spoke = 0.0
        self._rate = 0.0
        self._validation = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rate = matmul_rate(pl_module.device, str(trainer.precision))
        if not trainer.is_global_zero:
            return
        self._spoke = time.monotonic()
        if self.console.is_terminal:
            columns = (TextColumn("{task.completed}/{task.total} steps"), BarColumn(), TimeRemainingColumn(True))
            self._bar = Progress(
                *columns, TextColumn("{task.fields[text]}"), console=self.console, refresh_per_second=4
            )
            self._bar.start()
            self._bar.add_task("train", total=self.total, completed=trainer.global_step, text="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = time.monotonic()
        self._ends.append((now, trainer.global_step))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, text=self._text(trainer, pl_module))
        elif now - self._spoke >= _PLAIN_SECONDS:
            self._spoke = now
            self._say(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ends.clear()  # a validation's time is not the steps'

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "val/loss" in trainer.callback_metrics:
            self._validation = f", validation {trainer.callback_metrics['val/loss'].item():.4f}"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tokens_per_second(self, tokens_per_step: int) -> float | None:
        """Over the last steps; None before there are two."""
        if len(self._ends) < 2:
            return None
        (start, first), (end, last) = self._ends[0], self._ends[-1]
        return (last - first) * tokens_per_step / (end - start)

    def _text(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        assert isinstance(pl_module, RWKVModule)
        loss = self.metrics.latest.get("train/loss")
        text = "" if loss is None else f"loss {loss:.4f}"
        if speed := self.tokens_per_second(pl_module.tokens_per_step):
            mfu = utilisation(pl_module.model.matmul_parameters(), speed, self._rate, trainer.world_size)
            text += f"  {speed:,.0f} tokens/s  MFU {mfu:.0%}"
        return text + self._validation

    def _say(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RWKVModule)
        line = f"step {trainer.global_step}" + (f"/{self.total}" if self.total else "")
        line += f"  {self._text(trainer, pl_module)}"
        speed = self.tokens_per_second(pl_module.tokens_per_step)
        if self.total and speed:
            seconds = (self.total - trainer.global_step) * pl_module.tokens_per_step / speed
            line += f", {int(seconds // 60)} min {int(seconds % 60)} s left"
        self.console.print(line, highlight=False, soft_wrap=True)

    def _close(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, text=self._text(trainer, pl_module))
            self._bar.stop()
        else:
            self._say(trainer, pl_module)
