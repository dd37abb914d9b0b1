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
from rwkv_train.config.clock import TokenClock
from rwkv_train.data.batch import Batch
from rwkv_train.models import LanguageModel, RecipeRow, State
from rwkv_train.training.loss import (
    head_loss,
    head_nats,
    language_model_loss,
    predicted_text,
    summed_nats,
    too_many_logits,
)
from rwkv_train.training.optim import build_optimizer, learning_rate, parameter_groups
from rwkv_train.training.statistics import Statistics
from rwkv_train.training.step_verdict import StepVerdict
from rwkv_train.training.strategy import ShardedStrategy
from rwkv_train.training.validation_sums import ValidationResult, ValidationSums


def _recorded(record: Callable[..., None], readout: Callable[..., Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    """A readout whose arguments are recorded before."""
    record(hidden, weight)
    return readout(hidden, weight)


class RWKVModule(L.LightningModule):
    """Trains a language model.

    Args:
        model: the language model.
        recipe: each parameter's row, by name.
        optim: optimiser settings.
        total_steps: length of the run in optimiser steps; None: no end.
        clock: tokens trained on after each step.
        compile: whether training runs torch.compile of the model.
        sources: names of the validated sources, in the order of the validation loaders.
        statistics: measures the layers; None: every 100 steps.
        verdict: decides which steps are bad; None: those that are not finite.
        token_bytes: (V,) int64, bytes that each token counts as in bits per byte; None: one each.

    Attributes:
        grad_norm: () float32, of the last optimiser step, before clipping.
        lr: base learning rate of the last optimiser step.
        rewound: whether the next batch is of another step than the run; see `read_again`.
        validated: the last validation of this process; None: there was none, or the run was rewound since.
    """

    def __init__(
        self,
        model: LanguageModel,
        recipe: Mapping[str, RecipeRow],
        optim: OptimSettings,
        total_steps: int | None,
        clock: TokenClock,
        compile: bool = False,
        sources: Sequence[str] = ("",),
        statistics: Statistics | None = None,
        verdict: StepVerdict | None = None,
        token_bytes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.optim = optim
        self.total_steps = total_steps
        self.clock = clock
        self.statistics = statistics or Statistics(model, 100, hooks=not compile)
        self.verdict = verdict or StepVerdict()
        self.grad_norm = torch.tensor(math.nan)
        self.lr = math.nan
        self.rewound = False
        self._forward = [torch.compile(model, fullgraph=True) if compile else model]  # a list: not a second submodule
        ones = torch.ones(model.config.vocab_size, dtype=torch.int64)
        self._token_bytes = ones if token_bytes is None else token_bytes  # no buffer: DDP would send it at every step
        self.validation_sums = ValidationSums(sources)
        self.validated: ValidationResult | None = None

    def configure_model(self) -> None:
        """Called when the process group exists: the strategy gives the parameters memory where they have none."""
        self.strategy.materialise(self.model)

    @property
    def tokens_seen(self) -> int:
        return self.clock.tokens(self.trainer.global_step)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch, over all ranks and micro-batches."""
        return self.clock.batch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        """-1 makes Lightning start another iteration over the data: the run was rewound."""
        if self.rewound:
            self.rewound = False
            return -1
        if self._microbatches_done == 0:
            self.statistics.begin_step(self.trainer.global_step + 1, self.strategy)
            self.verdict.begin_step(self.strategy.root_device)
        return None

    def read_again(self) -> None:
        """Makes the next batch be read again: the run was rewound to another step than that of the batch in hand."""
        self.rewound, self.validated = True, None

    @property
    def _microbatches_done(self) -> int:
        """Micro-batches of the current step that are done; 0 where all are."""
        return len(self.verdict.losses) % self.trainer.accumulate_grad_batches

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, state = self._loss(self._forward[0], batch, self.optim.l2wrap, self.statistics)
        self.verdict.record_microbatch(loss, state, self._predicted_text(batch.targets))
        self.statistics.record_microbatch(state)
        return loss

    def _predicted_text(self, targets: Tensor) -> Tensor:
        self._token_bytes = self._token_bytes.to(targets.device)  # copied once
        return predicted_text(targets, self._token_bytes)

    def _loss(
        self, model: Callable[..., Any], batch: Batch, l2wrap: float, statistics: Statistics | None = None
    ) -> tuple[Tensor, State]:
        tokens, targets, starts, predictions = batch.tokens, batch.targets, batch.starts, batch.predictions
        if statistics is not None and not statistics.due:
            statistics = None
        if too_many_logits(targets, self.model.config.vocab_size):
            readout: Callable[..., Tensor] = partial(head_loss, targets=targets, l2wrap=l2wrap, predictions=predictions)
            if statistics is not None and statistics.hooks:
                readout = partial(_recorded, partial(statistics.record_hidden, targets, batch.sources), readout)
            loss, state = model(tokens, starts=starts, readout=readout)
            return loss, state
        logits, state = model(tokens, starts=starts)
        if statistics is not None:
            statistics.record_logits(logits, targets, batch.sources)
        return language_model_loss(logits, targets, l2wrap, predictions), state

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        tokens, targets, starts = batch.tokens, batch.targets, batch.starts
        if too_many_logits(targets, self.model.config.vocab_size):
            nats, _ = self.model(tokens, starts=starts, readout=partial(head_nats, targets=targets))
        else:
            logits, _ = self.model(tokens, starts=starts)
            nats, _ = summed_nats(logits, targets)
        self.validation_sums.add(dataloader_idx, nats, self._predicted_text(targets))

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss` (nats per token), exact over all predicted tokens of all ranks, and each source's own."""
        reduce = partial(self.trainer.strategy.reduce, reduce_op="sum")
        self.validated = found = self.validation_sums.result(reduce, self.trainer.global_step)
        many = torch.distributed.is_initialized()  # also with one rank, where Lightning warns otherwise
        self.log("val/loss", found.loss, sync_dist=many, add_dataloader_idx=False)
        for source, loss in found.by_source.items():
            self.log(f"val/loss/{source}", loss, sync_dist=many, add_dataloader_idx=False)

    def probe(self, batch: Batch) -> Tensor:
        """The loss () of a batch without L2Wrap and without gradient: equal weights and data give the same one."""
        with torch.no_grad():
            return self._loss(self.model, batch, 0.0)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Called after the strategy has sharded the parameters."""
        return build_optimizer(
            parameter_groups(self.model, self.recipe, self.optim.weight_decay, self.optim.rules), self.optim
        )

    @property
    def strategy(self) -> ShardedStrategy:
        return cast(ShardedStrategy, self.trainer.strategy)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        last = None if self.total_steps is None else self.clock.tokens(self.total_steps - 1)
        self.lr = learning_rate(self.optim, self.tokens_seen, last, self.clock.first_batch)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group["lr_multiplier"]

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips the gradient's norm, counted over all parameters of all ranks, and keeps what it was before.

        The step that follows changes nothing where the loss or the gradient is bad.
        """
        if self._microbatches_done:  # DeepSpeed's engine is called for every micro-batch
            return
        norm = self.strategy.clip(math.inf if self.optim.clip is None else self.optim.clip)
        self.strategy.skip_update_if(self.verdict.judge(norm))
        self.grad_norm = self.grad_norm if norm is None else norm

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self._microbatches_done:
            return
        norm = self.strategy.norm_of_step()
        self.grad_norm = self.grad_norm if norm is None else norm
        self.grad_norm = self.verdict.after_step(self.grad_norm)
