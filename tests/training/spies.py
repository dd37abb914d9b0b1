"""Callbacks that look into a run and write what they see beside its records; tests name them as `callbacks.….`"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn


class Look(Callback):
    """The dtypes inside the forward pass, the groups of the optimiser that steps, and what a tiny update changes."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.dtypes: dict[str, str] = {}
        self.seen: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = {id(module): name for name, module in pl_module.get_submodule("model").named_modules()}

        def note(module: nn.Module, inputs: Any) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                self.dtypes[f"{names[id(module)]}.{name}"] = str(parameter.dtype)

        for module in pl_module.get_submodule("model").modules():
            module.register_forward_pre_hook(note)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.seen["threads"] = torch.get_num_threads()
        self.seen["groups"] = [[g["lr_multiplier"], g["weight_decay"], g["lr"], len(g["params"])] for g in groups]
        if trainer.global_rank == 0:
            self.path.write_text(json.dumps({"dtypes": self.dtypes, **self.seen}))


class Step(Callback):
    """This rank's owned weights before and after the first step, as (name, first element, before, after)."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.before: dict[tuple[str, int], Tensor] = {}

    def _owned(self, trainer: L.Trainer) -> dict[tuple[str, int], Tensor]:
        shards = trainer.strategy.shards(moments=False)  # type: ignore[attr-defined]
        return {(shard.name, shard.start): shard.values.detach().clone() for shard in shards if shard.owned}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = self._owned(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 1:
            after = self._owned(trainer)
            found = [(*key, values, after[key]) for key, values in self.before.items()]
            torch.save({"lr": pl_module.lr, "found": found}, self.folder / f"{trainer.global_rank}.pth")


class Nudge(Callback):
    """Adds 1e-5 to every vector's first elements between two steps, through the shards, and keeps both probes."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        batches = trainer.datamodule.batches  # type: ignore[attr-defined]
        batch = strategy.batch_to_device(batches.lone_sample(0))
        found = []
        for _ in range(2):
            with trainer.precision_plugin.forward_context():
                loss = strategy.probe(batch)
            found.append(float(strategy.reduce(loss, reduce_op="mean")))
            for shard in strategy.shards(moments=False):
                if shard.kind == "weight" and shard.name.endswith(("time_mix_k", "ln_out.weight")):
                    shard.store(self._more(shard.values))
            strategy.filled()
        if trainer.global_rank == 0:
            self.path.write_text(json.dumps(found))

    @staticmethod
    def _more(values: Tensor) -> Tensor:
        return (values.detach().clone() + 1e-5).to(torch.float32)


class Trouble(Callback):
    """One rank sleeps in each step, or for good in one of them.

    Args:
        rank: which.
        seconds: of each step's sleep.
        hangs_at: the step, whose sleep has no end; 0: none.
    """

    def __init__(self, rank: int, seconds: float = 0.0, hangs_at: int = 0) -> None:
        self.rank, self.seconds, self.hangs_at = rank, seconds, hangs_at

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_rank == self.rank:
            time.sleep(10_000 if trainer.global_step + 1 == self.hangs_at else self.seconds)


class Peak(Callback):
    """The peak of this process's memory in the first steps after a start, above what it was without the model."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.before, self.steps = _status("VmRSS"), 0
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak until now

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.steps += 1
        if self.steps == 3:
            peak = _status("VmHWM") - self.before
            (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(peak))


class Start(Callback):
    """The peak of this process's memory until training starts, above what it was without the model, and its shard."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak until now

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        peak, strategy = _status("VmHWM") - self.before, trainer.strategy
        bytes_of_shard = sum(shard.values.numel() * 4 for shard in strategy.shards(moments=False))  # type: ignore[attr-defined]
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps({"peak": peak, "shard": bytes_of_shard}))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class Order(Callback):
    """The classes of the run's callbacks, in the order in which Lightning calls them."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.path.write_text("\n".join(type(callback).__name__ for callback in trainer.callbacks))  # type: ignore[attr-defined]


class Rows(Callback):
    """Appends the tokens of each row that is trained on to a file, one row a line, in hexadecimal digits."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with open(self.path, "a") as file:
            file.writelines(bytes(row).hex() + "\n" for row in batch.tokens.tolist())


class KeyedCallback(Callback):
    """Notes the key that it was made with."""

    keys: ClassVar[list[str]] = []

    def __init__(self, key: str) -> None:
        KeyedCallback.keys.append(key)
