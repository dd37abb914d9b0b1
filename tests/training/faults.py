"""Callbacks that cause bad steps, named in tests as `callbacks.….`, and a storage that is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from rwkv_train.checkpoint.storage import LocalStorage


class Fault(Callback):
    """At some steps: NaN in the activations of a block, or an infinite gradient on one rank, or a huge learning rate.

    Args:
        steps: numbers of the rows that are to be bad.
        kind: activation, gradient or rate.
        rank: on which the gradient becomes infinite.
    """

    def __init__(self, steps: list[int], kind: str = "activation", rank: int = 0) -> None:
        self.steps, self.kind, self.rank = steps, kind, rank
        self.now = False
        self.fired: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.kind == "activation":
            pl_module.get_submodule("model.blocks.1.att").register_forward_hook(self._spoil)

    def _spoil(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not self.now or not torch.is_grad_enabled():
            return None
        y, *rest = output
        return (y * float("nan"), *rest)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step + 1
        self.now = step in self.steps and step not in self.fired and not pl_module.rewound
        if self.now:
            self.fired.append(step)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.now and self.kind == "gradient" and trainer.global_rank == self.rank:
            gradient = pl_module.get_parameter("model.blocks.1.ffn.key.weight").grad
            if gradient is not None:
                getattr(gradient, "_local_tensor", gradient).view(-1)[0] = float("inf")  # of FSDP2: this rank's slice

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self.now and self.kind == "rate":
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(3.0)


class SmallFiles(LocalStorage):
    """A disk that refuses files of more than `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    @contextmanager
    def write(self, path: Path) -> Iterator[BinaryIO]:
        with super().write(path) as file:
            yield cast(BinaryIO, _SmallFile(file, self.size))


class _SmallFile:
    def __init__(self, file: BinaryIO, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
