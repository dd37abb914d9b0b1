"""The values of each layer, measured at every n-th step and kept on the device: the host does not wait for them.

Sums of squares and counts are added up over micro-batches and ranks, and divided at the end, so that micro-batches and
masks have the right weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_train.config import LOGITS_AT_ONCE
from rwkv_train.data.arrays import Ints
from rwkv_train.data.rows import IGNORED_TARGET
from rwkv_train.models import LanguageModel, State
from rwkv_train.models.architecture import OfOutput, OfParameter, OfState
from rwkv_train.training.strategy import ShardedStrategy
from rwkv_train.training.strategy.shared import GradientNorms

SAMPLES_PER_TENSOR = 4096  # values of each tensor from which the size of an update is estimated


class Statistics:
    """Measures one step on this rank.

    Args:
        model: the model that is trained.
        every: number of steps between two measurements.
        sources: names of the data sources, each of which gets a loss of its own; a single one does not.
        hooks: whether hooks on the blocks are possible (torch.compile of the complete model forbids them).

    Attributes:
        due: whether the current step is measured.
    """

    def __init__(self, model: LanguageModel, every: int, sources: Sequence[str] = ("",), hooks: bool = True) -> None:
        self.model, self.every, self.sources, self.hooks = model, every, sources, hooks
        self.due = False
        self._microbatches = 0
        self._sums: dict[str, Tensor] = {}  # added up over micro-batches and ranks
        self._max_logit: Tensor | None = None
        self._before: Tensor | None = None  # sampled weights before the step
        self._sampled: tuple[Tensor, Tensor] | None = None  # of each sampled value: block, and how many it represents
        self._blocks = cast("list[Any]", model.blocks)
        if hooks:
            for layer, block in enumerate(self._blocks):
                for key, statistic in model.architecture.statistics.items():
                    if isinstance(statistic, OfOutput):
                        module = block.get_submodule(statistic.module)
                        module.register_forward_hook(self._output(key, statistic, layer))
                block.register_forward_hook(self._contribution(layer))

    def begin_step(self, step: int, strategy: ShardedStrategy) -> None:
        """Before the first micro-batch of a step; `step` is the number of steps that are done after it."""
        self.due = step % self.every == 0
        self._max_logit = None
        self._microbatches, self._sums = 0, {}
        self._before = self._sampled_weights(strategy).clone() if self.due else None

    @torch.no_grad()
    def record_microbatch(self, state: State) -> None:
        """After the forward pass of a micro-batch, with the state at the end of its samples."""
        self._microbatches += 1
        if self.due:
            for key, statistic in self.model.architecture.statistics.items():
                if isinstance(statistic, OfState):
                    self._add(key, torch.stack([statistic.measure(layer) for layer in state.layers]))

    @torch.no_grad()
    def record_logits(self, logits: Tensor, targets: Tensor, sources: Ints) -> None:
        """Logits (B, T, V) and targets (B, T) of a micro-batch whose samples are from these sources (B)."""
        if self._max_logit is None:
            self._max_logit = logits.detach().abs().max().float()
        if len(self.sources) > 1:
            wide = logits.detach().float().flatten(0, 1)
            nats = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED_TARGET, reduction="none")
            self._add_by_source(nats.view(targets.shape).sum(1), targets, sources)

    @torch.no_grad()
    def record_hidden(self, targets: Tensor, sources: Ints, hidden: Tensor, weight: Tensor) -> None:
        """`record_logits` where the logits are not made at once: hidden (B, T, C), the head's weight (V, C)."""
        rows, goals = hidden.detach().flatten(0, 1), targets.flatten()
        size = max(1, LOGITS_AT_ONCE // len(weight))
        nats = []
        for first in range(0, len(rows), size):
            logits = F.linear(rows[first : first + size], weight).float()
            if self._max_logit is None:
                self._max_logit = logits.abs().max()
            if len(self.sources) == 1:
                return
            goal = goals[first : first + size]
            nats.append(F.cross_entropy(logits, goal, ignore_index=IGNORED_TARGET, reduction="none"))
        self._add_by_source(torch.cat(nats).view(targets.shape).sum(1), targets, sources)

    def _add_by_source(self, nats: Tensor, targets: Tensor, sources: Ints) -> None:
        """Adds the nats (B) of samples that are from these sources (B)."""
        index = torch.as_tensor(sources, device=nats.device)
        counts = (targets != IGNORED_TARGET).sum(1).to(nats)
        for key, values in (("nats", nats), ("predictions", counts)):
            self._add(key, torch.zeros(len(self.sources), device=nats.device).index_add_(0, index, values))

    def _output(self, key: str, statistic: OfOutput, layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.due and torch.is_grad_enabled():
                self._add_at(key, layer, statistic.measure(output.detach()))
                self._add_at(f"{key}:count", layer, torch.ones((), device=output.device))  # recomputed blocks: twice

        return hook

    def _contribution(self, layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if self.due and torch.is_grad_enabled():
                before, after = inputs[0].detach(), outputs[0].detach()
                self._add_at("added", layer, torch.linalg.vector_norm(after - before).float().square())
                self._add_at("input", layer, torch.linalg.vector_norm(before).float().square())

        return hook

    def _add(self, key: str, values: Tensor) -> None:
        self._sums[key] = self._sums[key] + values if key in self._sums else values

    def _add_at(self, key: str, layer: int, value: Tensor) -> None:
        if key not in self._sums:
            self._sums[key] = torch.zeros(len(self._blocks), device=value.device)
        self._sums[key][layer] += value

    @torch.no_grad()
    def layer_values(self, strategy: ShardedStrategy) -> dict[str, Tensor]:
        """The values of a measured step by key of metrics.jsonl; every rank calls it after the optimiser's step."""
        blocks = len(self._blocks)
        self._sums["update"], self._sums["weight"] = self._update(strategy)
        microbatches = self._sum_over_ranks()
        sums, found = self._sums, {}
        found.update(self._of_architecture(strategy, microbatches))
        if "input" in sums:
            found["layers/contribution"] = (sums["added"] / sums["input"]).sqrt()
        ratios = (sums["update"] / sums["weight"]).sqrt()  # NaN of a block that is not trained
        found["layers/update_ratio"] = ratios[:blocks]
        found["update_ratio"] = (sums["update"].sum() / sums["weight"].sum()).sqrt()
        if strategy.gradient_norms is not None:
            found["layers/grad_norm"] = self._gradient_norms(strategy.gradient_norms)
        if self._max_logit is not None:
            if dist.is_initialized():
                dist.all_reduce(self._max_logit, op=dist.ReduceOp.MAX)
            found["max_logit"] = self._max_logit
        if "nats" in sums:
            each = sums["nats"] / sums["predictions"]  # NaN of a source without a sample
            found.update({f"train/loss/{name}": loss for name, loss in zip(self.sources, each, strict=True)})
        return found

    def _sum_over_ranks(self) -> int:
        """Adds up the sums over all ranks, in one collective; the number of micro-batches of all ranks."""
        if not dist.is_initialized():
            return self._microbatches
        keys = sorted(self._sums)
        flat = torch.cat([self._sums[key].float() for key in keys])
        dist.all_reduce(flat)
        parts = flat.split([self._sums[key].numel() for key in keys])
        self._sums = dict(zip(keys, parts, strict=True))
        return self._microbatches * dist.get_world_size()

    def _of_architecture(self, strategy: ShardedStrategy, microbatches: int) -> dict[str, Tensor]:
        """The values that the architecture declares, from the sums over all ranks."""
        found = {}
        for key, statistic in self.model.architecture.statistics.items():
            if isinstance(statistic, OfParameter):
                parameters = [strategy.full_value(block.get_parameter(statistic.parameter)) for block in self._blocks]
                known = [parameter for parameter in parameters if parameter is not None]
                if len(known) == len(parameters):
                    found[key] = statistic.measure(torch.stack(known))
            elif key in self._sums:
                count = self._sums[f"{key}:count"] if isinstance(statistic, OfOutput) else microbatches
                mean = self._sums[key] / count
                found[key] = mean.sqrt() if isinstance(statistic, OfState) and statistic.root else mean
        return found

    def _gradient_norms(self, norms: GradientNorms) -> Tensor:
        """The gradient norm of each block (L), over its parameters that have a gradient."""
        blocks, squares = len(self._blocks), norms.values.float().square()
        layers = torch.tensor([_layer_of(name, blocks) for name in norms.names], device=squares.device)
        return torch.zeros(blocks + 1, device=squares.device).index_add_(0, layers, squares)[:blocks].sqrt()

    def _update(self, strategy: ShardedStrategy) -> tuple[Tensor, Tensor]:
        """This rank's sums of squares of update and trainable weights, each (L + 1): of each block, and of the rest."""
        assert self._before is not None
        assert self._sampled is not None
        before, after, (layers, represents) = self._before, self._sampled_weights(strategy), self._sampled
        zeros = torch.zeros(len(self._blocks) + 1, device=before.device)
        update = zeros.index_add(0, layers, (after - before).square() * represents)
        return update, zeros.index_add(0, layers, before.square() * represents)

    def _sampled_weights(self, strategy: ShardedStrategy) -> Tensor:
        """About SAMPLES_PER_TENSOR values (n) of every trainable tensor, from the shards that this rank owns."""
        trainable = {name for name, _ in strategy.trainable_weights()}
        chosen, layers, represents = [torch.zeros(0, device=strategy.root_device)], [], []
        for shard in strategy.shards(moments=False):
            if shard.owned and shard.name in trainable and shard.values.numel():
                step = max(1, math.prod(strategy.shapes[shard.name]) // SAMPLES_PER_TENSOR)
                values = shard.values.detach()[::step]
                chosen.append(values)
                if self._sampled is None:
                    layers += [_layer_of(shard.name, len(self._blocks))] * len(values)
                    represents += [shard.values.numel() / len(values)] * len(values)
        flat = torch.cat([values.to(strategy.root_device) for values in chosen])
        if self._sampled is None:
            numbers = torch.tensor(layers, dtype=torch.int64, device=flat.device)  # none on a rank that owns nothing
            self._sampled = numbers, torch.tensor(represents, dtype=torch.float32, device=flat.device)
        return flat


def _layer_of(name: str, otherwise: int) -> int:
    return int(name.split(".")[1]) if name.startswith("blocks.") else otherwise
