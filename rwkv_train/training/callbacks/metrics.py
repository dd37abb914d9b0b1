"""metrics.jsonl: one object per optimiser step, the truth that every other record is made from."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from rwkv_train.training.module import RWKVModule
from rwkv_train.training.records import JsonLines


class Metrics(Callback):
    """Writes a row for each step when the next one begins: by then its validation is done and no device waits.

    Columns: step, tokens, train/loss (nats per token, mean of the global batch before the step), lr, grad_norm (before
    clipping), seconds (of the step), and after a validation val/loss, val/bits_per_byte, val/perplexity. With several
    sources also tokens/NAME (read of each so far) and val/loss/NAME.

    Args:
        lines: where the rows go.
        bytes_per_token: of the held-out text, for bits per byte.
    """

    def __init__(self, lines: JsonLines, bytes_per_token: float) -> None:
        self.lines, self.bytes_per_token = lines, bytes_per_token
        self.latest: dict[str, Any] = {}  # the last row that was written
        self._pending: dict[str, Any] | None = None
        self._began = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._write(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, RWKVModule)
        if len(pl_module.losses) < trainer.accumulate_grad_batches:
            return
        loss = torch.stack(pl_module.losses).mean()
        pl_module.losses.clear()
        now = time.perf_counter()
        self._pending = {
            "step": trainer.global_step,
            "tokens": pl_module.tokens_seen,
            "train/loss": trainer.strategy.reduce(loss, reduce_op="mean"),
            "lr": pl_module.lr,
            "grad_norm": pl_module.grad_norm,
            "seconds": round(now - self._began, 6),
        }
        by_source = trainer.datamodule.batches.tokens_by_source(trainer.global_step)  # type: ignore[attr-defined]
        if len(by_source) > 1:
            self._pending.update({f"tokens/{name}": tokens for name, tokens in by_source.items()})
        self._began = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._pending is None or "val/loss" not in trainer.callback_metrics:
            return
        loss = trainer.callback_metrics["val/loss"].item()
        self._pending["val/loss"] = loss
        self._pending["val/bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        self._pending["val/perplexity"] = math.exp(min(loss, 700.0))
        named = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("val/loss/")}
        self._pending.update({key: value.item() for key, value in named.items()})
        self._began = time.perf_counter()  # the next step's time does not count the validation

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        if self._pending is None:
            return
        row = {key: value.item() if isinstance(value, Tensor) else value for key, value in self._pending.items()}
        self._pending = None
        self.latest = row
        self.lines.append(row)
        logged = {key: value for key, value in row.items() if key not in ("step", "seconds")}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=int(row["step"]))
