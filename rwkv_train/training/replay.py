"""`replay=FILE`: repeats one bad step exactly, and checks every tensor of it.

The file names the run's config and the checkpoint before the step. The steps in between are trained again, equal to the
last bit, in a directory that is removed afterwards; nothing of the run itself is touched.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn

from rwkv_train.config import BudgetSettings, Config, RunSettings
from rwkv_train.config.schema import from_tree
from rwkv_train.rundir.directory import PassedOver, RunDirectory
from rwkv_train.rundir.durable import write_state
from rwkv_train.rundir.replay_file import load_replay
from rwkv_train.training.module import RWKVModule
from rwkv_train.user_path import user_path


@contextmanager
def replayed(config: Config, first: bool) -> Iterator[Config]:
    """Yields the run's own config, resumed from the checkpoint before the step, in a directory that the block removes.

    Args:
        config: with `replay`. Of the rest only callbacks and packages count: nothing is instantiated from a file.
        first: whether this process removes the directory.
    """
    file = user_path(str(config.replay))
    record = load_replay(file)
    own = from_tree({**record["config"], "logger": {}, "callbacks": {}})
    root = file.parent / f".again_{file.stem}"
    if first:
        shutil.rmtree(root, ignore_errors=True)
        run = RunDirectory(str(root), "again")
        run.path.mkdir(parents=True)
        write_state(run.passed_over, PassedOver(0, record["skipped"]).as_json())
    try:
        yield replace(
            own,
            run=RunSettings(name="again", root=str(root), allow_changes=True),
            resume=record["checkpoint"] or "never",
            budget=BudgetSettings(own.budget.total, None),
            samples=replace(own.samples, tokens=0),
            profile=False,
            replay=str(file),
            callbacks=config.callbacks,
            packages=config.packages,
        )
    finally:
        if first:
            shutil.rmtree(root, ignore_errors=True)


class Replay(Callback):
    """Checks every tensor of one step, and ends the run after it.

    Args:
        record: of the bad step.
        console: where the findings are printed.

    Attributes:
        healthy: whether the step was not bad this time.
    """

    def __init__(self, record: dict[str, Any], console: Console) -> None:
        self.record, self.console = record, console
        self.healthy = True
        self._found: list[str] = []
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.limit_val_batches = 0
        self.console.print(
            f"replay  step {self.record['step']}, {self.record['step'] - trainer.global_step} steps from here"
        )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.record["step"] - 1 or self._hooks:
            return
        for name, parameter in pl_module.named_parameters():
            self._check(f"the weights of {_short(name)}", parameter.detach())
        for name, module in pl_module.named_modules():
            if name and not isinstance(module, nn.ModuleList):
                self._hooks.append(module.register_forward_hook(self._hook(_short(name))))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if isinstance(values, Tensor):
                self._check(f"the output of {name or 'the model'}", values.detach())

        return hook

    def _check(self, what: str, values: Tensor) -> None:
        """Notes a tensor with values that are not finite."""
        bad = ~values.isfinite()
        if not bool(bad.any()):
            return
        rows = ""
        if values.dim() == 3 and what.startswith("the output"):  # (B, T, C)
            rows = f", in rows {bad.flatten(1).any(1).nonzero().flatten().tolist()} of the pass"
        self._found.append(f"{what} {tuple(values.shape)}: {int(bad.sum())} values{rows}")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._hooks:
            return
        for name, parameter in reversed(list(pl_module.named_parameters())):  # as the backward pass
            if parameter.grad is not None:
                self._check(f"the gradient of {_short(name)}", parameter.grad.detach())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.record["step"]:
            return
        assert isinstance(pl_module, RWKVModule)
        for hook in self._hooks:
            hook.remove()
        assert pl_module.verdict.loss is not None
        loss, norm = float(pl_module.verdict.loss), float(pl_module.grad_norm)
        self.healthy = math.isfinite(loss) and math.isfinite(norm) and self.record["kind"] != "spike"
        before = self.record["loss"]
        same = loss == before or (before is None and not math.isfinite(loss))
        comparison = "as it was then" if same else f"then it was {'not finite' if before is None else before}"
        self._say(f"loss {loss:.6g} ({comparison}), gradient norm {norm:.6g}")
        if self._found:
            self._say(f"the first that is not finite: {self._found[0]}")
            for line in self._found[1:4]:
                self._say(f"  then {line}")
        elif self.healthy:
            self._say(
                "every tensor is finite now: a callback or the hardware made the step bad, not its data or its weights"
            )
        trainer.should_stop = True

    def _say(self, text: str) -> None:
        self.console.print(f"replay  {text}")


def _short(name: str) -> str:
    """A name inside the LightningModule as the model's own name."""
    return name.removeprefix("model.") if name != "model" else ""
