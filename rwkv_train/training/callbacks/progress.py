"""Progress on the console: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rwkv_train.rundir.jsonl import MetricsRow
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback
from rwkv_train.training.callbacks.metrics import Metrics

_LINE_INTERVAL = 15.0  # seconds between two lines where the output is not a terminal
_BAR_INTERVAL = 0.25  # seconds between two updates of the bar
_WINDOW = 50  # steps over which the speed is averaged


class ProgressBar(Callback):
    """Shows loss, tokens per second, MFU, time left, the next checkpoint and the last validation loss.

    Args:
        metrics: source of the rows that are shown.
        saving: knows how often a checkpoint is due.
        total: total steps of the run; None: no limit.
        console: the output; only rank 0's is not quiet.
        validation: steps between validations, where a checkpoint follows each; None: none follows.
    """

    def __init__(
        self,
        metrics: Metrics,
        saving: CheckpointCallback,
        total: int | None,
        console: Console,
        validation: int | None = None,
    ) -> None:
        self.total, self.console = total, console
        self._intervals = [saving.every, *([] if validation is None else [validation])]  # of checkpoints, in steps
        self._bar: Progress | None = None
        self._rows: deque[MetricsRow] = deque(maxlen=_WINDOW)
        self._shown_at = time.monotonic()
        self._validation = ""
        metrics.listeners.append(self._add)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shown_at = time.monotonic()
        if self.console.is_terminal and not self.console.quiet:
            columns = (
                TextColumn("{task.completed}/{task.total} steps"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4)
            self._bar.start()
            self._bar.add_task("train", total=self.total, completed=trainer.global_step, text="")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], text="validating")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._rows:
            self._show()
        self.on_exception()

    def on_exception(self, *args: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _add(self, row: MetricsRow) -> None:
        if self.console.quiet:
            return
        if self._rows and row["step"] <= self._rows[-1]["step"]:  # the run was rewound
            self._rows.clear()
        self._rows.append(row)
        if row.get("val/loss") is not None:
            self._validation = f"validation {row['val/loss']:.4f}"
        if time.monotonic() - self._shown_at >= (_LINE_INTERVAL if self._bar is None else _BAR_INTERVAL):
            self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        step = self._rows[-1]["step"]
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=self.text())
        else:
            of = f"/{self.total}" if self.total else ""
            self.console.print(f"step {step}{of}  {self.text()}", highlight=False, soft_wrap=True)

    def text(self) -> str:
        """The last rows as one line."""
        row, seconds = self._rows[-1], sum(row["seconds"] for row in self._rows)
        speed = len(self._rows) / seconds  # steps a second
        parts = [f"loss {row['train/loss']:.4f}" if row["train/loss"] is not None else "loss not finite"]
        if len(self._rows) > 1:
            share = speed * sum(each["mfu"] * each["seconds"] for each in self._rows) / len(self._rows)
            parts += [f"{speed * row['tokens_per_second'] * row['seconds']:,.0f} tokens/s", f"MFU {share:.0%}"]
            if self.total and row["step"] < self.total:
                parts.append(f"{span((self.total - row['step']) / speed)} left")
                due = min(interval - row["step"] % interval for interval in self._intervals)
                parts.append(f"checkpoint in {span(due / speed)}")
        return ", ".join([*parts, *([self._validation] if self._validation else [])])


def span(seconds: float) -> str:
    """3 s, 4 min 5 s, 6 h 7 min, 8 d 9 h."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    rounded = round(seconds)
    for number, (name, size) in enumerate(units):
        if rounded >= size:
            rest = rounded % size // units[number + 1][1] if number < 3 else 0
            return f"{rounded // size} {name}" + (f" {rest} {units[number + 1][0]}" if rest else "")
    return "0 s"
