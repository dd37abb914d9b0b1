"""The LightningModule: one training step, one validation step, and the optimiser that the recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from rwkv_train.config import OptimSettings
from rwkv_train.data.rows import IGNORED
from rwkv_train.models import LanguageModel, RecipeRow, State
from rwkv_train.training.loss import head_loss, head_nats, language_model_loss, summed_nats, too_many_logits
from rwkv_train.training.optim import build_optimizer, learning_rate, parameter_groups
from rwkv_train.training.statistics import Statistics
from rwkv_train.training.strategy import ShardedStrategy

Batch = Sequence[Any]  # tokens, targets and, of documents, starts and predictions: data/ahead.py


def documents_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Tokens, targets, starts and predictions of a batch; the last two are None where it is cut from the stream."""
    tokens, targets, *rest = batch
    starts, predictions = rest or (None, None)
    return tokens, targets, starts, predictions


def _told(tell: Callable[..., None], readout: Callable[..., Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    """A readout whose arguments somebody else gets as well."""
    tell(hidden, weight)
    return readout(hidden, weight)


class RWKVModule(L.LightningModule):
    """Trains a model on batches of (tokens, targets), each (B, T) int64; documents bring their starts and a mask.

    Args:
        model: the language model.
        recipe: each parameter's row, by name.
        optim: optimiser settings.
        total_steps: length of the run in optimiser steps; None: no end.
        tokens_per_step: of the whole batch, over all devices and micro-batches.
        compile: whether training runs torch.compile of the model.
        sources: names of the validated ones, in the order of the validation's loaders.
        statistics: what each step tells of itself; None: a plain one.
    """

    def __init__(
        self,
        model: LanguageModel,
        recipe: Mapping[str, RecipeRow],
        optim: OptimSettings,
        total_steps: int | None,
        tokens_per_step: int,
        compile: bool = False,
        sources: Sequence[str] = ("",),
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.optim = optim
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.statistics = statistics or Statistics(model, 100, hooks=not compile)
        self.grad_norm = torch.tensor(math.nan)  # of the last optimiser step, before clipping
        self.lr = math.nan
        self.rewound = False  # whether the run stands before another step than the batch that comes next
        self._forward = [torch.compile(model, fullgraph=True) if compile else model]  # a list: not a second submodule
        self._sources = sources
        self._validation: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sources]

    def configure_model(self) -> None:
        """Called when the ranks know each other: the strategy gives the parameters memory where they have none."""
        self.strategy.materialise(self.model)

    def read_again(self) -> None:
        """The next batch is of another step than the run: Lightning shall ask for the data again."""
        self.rewound = True

    @property
    def tokens_seen(self) -> int:
        return self.trainer.global_step * self.tokens_per_step

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        """-1 tells Lightning to read the data anew: the run was rewound."""
        if self.rewound:
            self.rewound = False
            return -1
        if self._passes == 0:
            self.statistics.begin(self.trainer.global_step + 1, self.strategy)
        return None

    @property
    def _passes(self) -> int:
        """How many of the step's passes are done."""
        return len(self.statistics.losses) % self.trainer.accumulate_grad_batches

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, state = self._loss(self._forward[0], batch, self.optim.l2wrap, self.statistics)
        self.statistics.passed(loss, state)
        return loss

    def _loss(
        self, model: Callable[..., Any], batch: Batch, l2wrap: float, statistics: Statistics | None = None
    ) -> tuple[Tensor, State]:
        tokens, targets, starts, predictions = documents_of(batch)
        if statistics is not None and not statistics.due:
            statistics = None
        if too_many_logits(targets, self.model.config.vocab_size):
            readout: Callable[..., Tensor] = partial(head_loss, targets=targets, l2wrap=l2wrap, predictions=predictions)
            if statistics is not None and statistics.listens:
                readout = partial(_told, partial(statistics.hidden, targets, self._sources_of_pass()), readout)
            loss, state = model(tokens, starts=starts, readout=readout)
            return loss, state
        logits, state = model(tokens, starts=starts)
        if statistics is not None:
            statistics.logits(logits, targets, self._sources_of_pass())
        return language_model_loss(logits, targets, l2wrap, predictions), state

    def _sources_of_pass(self) -> Sequence[int]:
        """The number of the source of each sample of this pass on this rank."""
        data, passes = self.trainer.datamodule.batches, self._passes  # type: ignore[attr-defined]
        sources: Sequence[int] = data.sources_of_pass(self.trainer.global_step, passes)
        return sources

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        tokens, targets, starts, _ = documents_of(batch)
        if too_many_logits(targets, self.model.config.vocab_size):
            nats, _ = self.model(tokens, starts=starts, readout=partial(head_nats, targets=targets))
            self._validation[dataloader_idx].append((nats, (targets != IGNORED).sum()))
            return
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
        many = torch.distributed.is_initialized()  # also of one process, where Lightning warns otherwise
        nats, count = sums.sum(0)
        self.log("val/loss", nats / count, sync_dist=many, add_dataloader_idx=False)
        if len(self._sources) > 1:
            for source, (nats, count) in zip(self._sources, sums, strict=True):
                self.log(f"val/loss/{source}", nats / count, sync_dist=many, add_dataloader_idx=False)

    def probe(self, batch: Batch) -> Tensor:
        """The loss of a batch, without L2Wrap and without gradient: what tells one set of weights from another."""
        with torch.no_grad():
            return self._loss(self.model, batch, 0.0)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Called when the strategy has made the parameters what they are while it trains."""
        return build_optimizer(
            parameter_groups(self.model, self.recipe, self.optim.weight_decay, self.optim.rules), self.optim
        )

    @property
    def strategy(self) -> ShardedStrategy:
        return cast(ShardedStrategy, self.trainer.strategy)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.lr = learning_rate(self.optim, self.trainer.global_step, self.total_steps, self.tokens_per_step)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group["lr_multiplier"]

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips the gradient's norm, counted over all parameters of all ranks, and keeps what it was before.

        The step that follows changes nothing where the loss or the gradient is bad.
        """
        if self._passes:  # DeepSpeed's engine is called for every pass
            return
        norm = self.strategy.clip(math.inf if self.optim.clip is None else self.optim.clip)
        self.strategy.skip_update_if(self.statistics.judge(norm))
        self.grad_norm = self.grad_norm if norm is None else norm

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self._passes:
            return
        norm = self.strategy.norm_of_step()
        self.grad_norm = self.grad_norm if norm is None else norm
        self.grad_norm = self.statistics.stepped(self.grad_norm)
