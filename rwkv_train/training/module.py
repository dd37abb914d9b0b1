"""The LightningModule: one training step, one validation step, and the optimiser that the recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rwkv_train.config import OptimSettings
from rwkv_train.models import RWKV, recipe_of
from rwkv_train.training.checkpoint import by_name, by_number
from rwkv_train.training.loss import language_model_loss, summed_nats
from rwkv_train.training.optim import build_optimizer, learning_rate, parameter_groups

Batch = Sequence[Any]  # tokens, targets and, of documents, starts and predictions: data/ahead.py


def documents_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Tokens, targets, starts and predictions of a batch; the last two are None where it is cut from the stream."""
    tokens, targets, *rest = batch
    starts, predictions = rest or (None, None)
    return tokens, targets, starts, predictions


class RWKVModule(L.LightningModule):
    """Trains a model on batches of (tokens, targets), each (B, T) int64; documents bring their starts and a mask.

    Args:
        model: the language model.
        optim: optimiser settings.
        total_steps: length of the run in optimiser steps; None: no end.
        tokens_per_step: of the whole batch, over all devices and micro-batches.
        compile: whether training runs torch.compile of the model.
        sources: names of the validated ones, in the order of the validation's loaders.
    """

    def __init__(
        self,
        model: RWKV,
        optim: OptimSettings,
        total_steps: int | None,
        tokens_per_step: int,
        compile: bool = False,
        sources: Sequence[str] = ("",),
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.groups = parameter_groups(model, recipe_of(model), optim.weight_decay, optim.rules)
        self.losses: list[Tensor] = []  # of the micro-batches since the last optimiser step, on the device
        self.grad_norm = torch.tensor(math.nan)  # of the last optimiser step, before clipping
        self.lr = math.nan
        self._forward = [torch.compile(model, fullgraph=True) if compile else model]  # a list: not a second submodule
        self._sources = sources
        self._validation: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sources]

    @property
    def tokens_seen(self) -> int:
        return self.trainer.global_step * self.tokens_per_step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens, targets, starts, predictions = documents_of(batch)
        logits, _ = self._forward[0](tokens, starts=starts)
        loss = language_model_loss(logits, targets, self.optim.l2wrap, predictions)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        tokens, targets, starts, _ = documents_of(batch)
        logits, _ = self.model(tokens, starts=starts)
        self._validation[dataloader_idx].append(summed_nats(logits, targets))

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss` (nats per token), exact over all predicted tokens of all ranks, and each source's own."""
        rows = []
        for results in self._validation:
            nats = torch.stack([sums for sums, _ in results]).sum()
            rows.append(torch.stack([nats, torch.stack([counts for _, counts in results]).sum().to(nats)]))
            results.clear()
        sums = self.trainer.strategy.reduce(torch.stack(rows), reduce_op="sum")  # (sources, 2)
        many = self.trainer.world_size > 1
        nats, count = sums.sum(0)
        self.log("val/loss", nats / count, sync_dist=many, add_dataloader_idx=False)
        if len(self._sources) > 1:
            for source, (nats, count) in zip(self._sources, sums, strict=True):
                self.log(f"val/loss/{source}", nats / count, sync_dist=many, add_dataloader_idx=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.groups, self.optim)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.lr = learning_rate(self.optim, self.trainer.global_step, self.total_steps, self.tokens_per_step)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group["lr_multiplier"]

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips the gradient's norm, counted over all parameters of all ranks, and keeps what it was before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = math.inf if self.optim.clip is None else self.optim.clip
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts Lightning's dict into our form: weights under the field's names, optimiser state by parameter name."""
        prefix = "model."
        weights = checkpoint.pop("state_dict")
        checkpoint["weights"] = {name.removeprefix(prefix): value for name, value in weights.items()}
        checkpoint["optimizer_states"] = [by_name(state) for state in checkpoint["optimizer_states"]]
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"model.{name}": value for name, value in checkpoint.pop("weights").items()}
        order = build_optimizer(self.groups, self.optim)
        checkpoint["optimizer_states"] = [by_number(named, order) for named in checkpoint["optimizer_states"]]
        torch.set_rng_state(checkpoint["random_state"])
