"""What a step tells of itself beside its loss, kept on the device: nothing here waits for it.

Every step: loss, gradient's norm, and whether they are good. Every n-th step: the values of each layer. Sums of
squares and counts are added up over passes and ranks, and divided at the end, so that passes and masks weigh right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_train.config import EVIDENCE_BYTES, LOGITS_AT_ONCE
from rwkv_train.data.rows import IGNORED
from rwkv_train.models import LanguageModel, State
from rwkv_train.models.architecture import OfOutput, OfParameter, OfState
from rwkv_train.training.strategy import ShardedStrategy
from rwkv_train.training.strategy.shared import GradientNorms

FINITE = torch.finfo(torch.float32).max
SAMPLE = 4096  # values of each tensor from which the size of an update is estimated


class Statistics:
    """Of the current step, on this rank.

    Args:
        model: what is trained.
        every: steps between two that have the values of each layer.
        sources: names, for the loss of each; a single one has none of its own.
        hooks: whether the blocks may be listened to (torch.compile of the whole model forbids it).

    Attributes:
        due: whether this step has the values of each layer.
        bad: () bool, whether this step's update is left out; None before it is known.
        skipped: () float32, how many updates were left out so far; None before the first step.
        limit: a loss above it is bad.
    """

    def __init__(self, model: LanguageModel, every: int, sources: Sequence[str] = ("",), hooks: bool = True) -> None:
        self.model, self.every, self.sources = model, every, sources
        self.due = False
        self.bad: Tensor | None = None
        self.loss: Tensor | None = None
        self.skipped: Tensor | None = None
        self.skipped_before = 0  # by the processes before this one
        self.limit = math.inf
        self.losses: list[Tensor] = []
        self._good: Tensor | None = None  # whether the gradient is finite on all ranks; None: not known before the step
        self.finite: list[Tensor] = []  # (P, L, B) of each pass: State.finite at the end of its samples
        self._sums: dict[str, Tensor] = {}  # added up over passes and ranks
        self._max_logit: Tensor | None = None
        self._sample: Tensor | None = None  # of the weights before the step
        self._of: tuple[Tensor, Tensor] | None = None  # of each value of it, the block and how many it stands for
        self.listens = hooks
        self._blocks = cast("list[Any]", model.blocks)
        if hooks:
            for layer, block in enumerate(self._blocks):
                for key, statistic in model.architecture.statistics.items():
                    if isinstance(statistic, OfOutput):
                        module = block.get_submodule(statistic.module)
                        module.register_forward_hook(self._output(key, statistic, layer))
                block.register_forward_hook(self._contribution(layer))

    def set_limit(self, loss: float) -> None:
        """A loss above it is bad from now on."""
        self.limit = loss

    def count_skipped_from(self, skipped: int) -> None:
        """Goes on counting from the updates that the run had left out at the step it resumes from."""
        self.skipped_before = skipped
        if self.skipped is not None:
            self.skipped.fill_(skipped)

    def begin(self, step: int, strategy: ShardedStrategy) -> None:
        """Before the first pass of the step that makes `step` of them done."""
        self.due = step % self.every == 0
        self.bad = self.loss = self._max_logit = None
        self.losses, self.finite, self._sums = [], [], {}
        self._sample = self._some_weights(strategy).clone() if self.due else None
        if self.skipped is None:
            self.skipped = torch.full((), float(self.skipped_before), device=strategy.root_device)

    def passed(self, loss: Tensor, state: State) -> None:
        """A pass was computed."""
        self.losses.append(loss.detach())
        self.finite.append(state.finite(EVIDENCE_BYTES))
        if self.due:
            with torch.no_grad():
                for key, statistic in self.model.architecture.statistics.items():
                    if isinstance(statistic, OfState):
                        self._add(key, torch.stack([statistic.measure(layer) for layer in state.layers]))

    @torch.no_grad()
    def logits(self, logits: Tensor, targets: Tensor, sources: Sequence[int]) -> None:
        """Of a pass (B, T, V), or of as many of its rows as were made at once."""
        if self._max_logit is None:
            self._max_logit = logits.detach().abs().max().float()
        if len(self.sources) > 1:
            wide = logits.detach().float().flatten(0, 1)
            nats = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="none").view(targets.shape)
            self._by_source(nats.sum(1), targets, sources)

    @torch.no_grad()
    def hidden(self, targets: Tensor, sources: Sequence[int], hidden: Tensor, weight: Tensor) -> None:
        """The same of a pass whose logits are too many: hidden (B, T, C), the head's weight (V, C)."""
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
            nats.append(F.cross_entropy(logits, goal, ignore_index=IGNORED, reduction="none"))
        self._by_source(torch.cat(nats).view(targets.shape).sum(1), targets, sources)

    def _by_source(self, nats: Tensor, targets: Tensor, sources: Sequence[int]) -> None:
        """Nats (B,) of samples whose sources have these numbers."""
        rank_info = torch.as_tensor(list(sources), device=nats.device)
        counts = (targets != IGNORED).sum(1).to(nats)
        for key, values in (("nats", nats), ("predictions", counts)):
            self._add(key, torch.zeros(len(self.sources), device=nats.device).index_add_(0, rank_info, values))

    def _output(self, key: str, statistic: OfOutput, layer: int) -> Any:
        def listen(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.due and torch.is_grad_enabled():
                self._add_at(key, layer, statistic.measure(output.detach()))
                self._add_at(f"{key}:count", layer, torch.ones((), device=output.device))  # recomputed blocks: twice

        return listen

    def _contribution(self, layer: int) -> Any:
        def listen(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if self.due and torch.is_grad_enabled():
                before, after = inputs[0].detach(), outputs[0].detach()
                self._add_at("added", layer, torch.linalg.vector_norm(after - before).float().square())
                self._add_at("input", layer, torch.linalg.vector_norm(before).float().square())

        return listen

    def _add(self, key: str, values: Tensor) -> None:
        self._sums[key] = self._sums[key] + values if key in self._sums else values

    def _add_at(self, key: str, layer: int, value: Tensor) -> None:
        if key not in self._sums:
            self._sums[key] = torch.zeros(len(self._blocks), device=value.device)
        self._sums[key][layer] += value

    def judge(self, norm: Tensor | None) -> Tensor:
        """Whether the step is bad, () bool, the same on all ranks; called before the optimiser's step.

        Args:
            norm: of the gradient of all ranks; None: not known yet, the strategy itself refuses a bad one.
        """
        loss = self.losses[0] if len(self.losses) == 1 else torch.stack(self.losses).mean()
        good = None if norm is None else norm <= FINITE
        if dist.is_initialized():
            told = torch.stack([loss, torch.ones_like(loss) if good is None else good.to(loss)])
            dist.all_reduce(told)
            loss, count = (told / dist.get_world_size()).unbind()
            good = None if good is None else count == 1
        self.loss, self._good = loss, good
        fits = loss <= min(self.limit, FINITE)  # false of what is no number
        self.bad = ~fits if good is None else ~(fits & good)
        return self.bad

    def stepped(self, norm: Tensor) -> Tensor:
        """After the optimiser's step, whose gradient had that norm; it is NaN where it is bad on any rank."""
        assert self.bad is not None
        assert self.skipped is not None
        if self._good is None:
            self.bad = self.bad | ~(norm.to(self.bad.device) <= FINITE)
        elif dist.is_initialized():
            norm = torch.where(self._good, norm, math.nan)
        self.skipped = self.skipped + self.bad
        return norm

    @torch.no_grad()
    def of_layers(self, strategy: ShardedStrategy, gradient_norms: GradientNorms | None) -> dict[str, Tensor]:
        """The values of an n-th step by their keys; every rank calls it behind the optimiser's step."""
        blocks = len(self._blocks)
        self._sums["update"], self._sums["weight"] = self._update(strategy)
        keys = sorted(self._sums)
        passes = len(self.losses)
        if dist.is_initialized():
            flat = torch.cat([self._sums[key].float() for key in keys])
            dist.all_reduce(flat)
            parts = flat.split([self._sums[key].numel() for key in keys])
            self._sums = dict(zip(keys, parts, strict=True))
            passes *= dist.get_world_size()
        sums, found = self._sums, {}
        found.update(self._of_architecture(strategy, passes))
        if "input" in sums:
            found["layers/contribution"] = (sums["added"] / sums["input"]).sqrt()
        ratios = (sums["update"] / sums["weight"]).sqrt()
        found["layers/update_ratio"] = ratios[:blocks]
        found["update_ratio"] = (sums["update"].sum() / sums["weight"].sum()).sqrt()
        if gradient_norms is not None:
            values = gradient_norms.values.float().square()
            layers = torch.tensor([_layer_of(name, blocks) for name in gradient_norms.names], device=values.device)
            squares = torch.zeros(blocks + 1, device=values.device).index_add_(0, layers, values)
            found["layers/grad_norm"] = squares[:blocks].sqrt()
        if self._max_logit is not None:
            if dist.is_initialized():
                dist.all_reduce(self._max_logit, op=dist.ReduceOp.MAX)
            found["max_logit"] = self._max_logit
        if "nats" in sums:
            each = sums["nats"] / sums["predictions"]  # not a number where a source has no sample
            found.update({f"train/loss/{name}": loss for name, loss in zip(self.sources, each, strict=True)})
        return found

    def _of_architecture(self, strategy: ShardedStrategy, passes: int) -> dict[str, Tensor]:
        """The values that the architecture declares, from the sums over all ranks."""
        found = {}
        for key, statistic in self.model.architecture.statistics.items():
            if isinstance(statistic, OfParameter):
                parameters = [strategy.whole(block.get_parameter(statistic.parameter)) for block in self._blocks]
                known = [parameter for parameter in parameters if parameter is not None]
                if len(known) == len(parameters):
                    found[key] = statistic.measure(torch.stack(known))
            elif key in self._sums:
                mean = self._sums[key] / (self._sums[f"{key}:count"] if isinstance(statistic, OfOutput) else passes)
                found[key] = mean.sqrt() if isinstance(statistic, OfState) and statistic.root else mean
        return found

    def _update(self, strategy: ShardedStrategy) -> tuple[Tensor, Tensor]:
        """Sums of squares of the update and of the weights, of each block and of the rest; this rank's share."""
        assert self._sample is not None
        assert self._of is not None
        before, after, (layers, stands_for) = self._sample, self._some_weights(strategy), self._of
        zeros = torch.zeros(len(self._blocks) + 1, device=before.device)
        update = zeros.index_add(0, layers, (after - before).square() * stands_for)
        return update, zeros.index_add(0, layers, before.square() * stands_for)

    def _some_weights(self, strategy: ShardedStrategy) -> Tensor:
        """About SAMPLE values of every trainable tensor, of the pieces that this rank owns, (n)."""
        trainable = {name for name, _ in strategy.trainable_weights()}
        chosen, layers, stands_for = [torch.zeros(0, device=strategy.root_device)], [], []
        for piece in strategy.pieces(moments=False):
            if piece.owned and piece.name in trainable and piece.values.numel():
                values = piece.values.detach()[:: max(1, math.prod(strategy.shapes[piece.name]) // SAMPLE)]
                chosen.append(values)
                if self._of is None:
                    layers += [_layer_of(piece.name, len(self._blocks))] * len(values)
                    stands_for += [piece.values.numel() / len(values)] * len(values)
        flat = torch.cat([values.to(strategy.root_device) for values in chosen])
        if self._of is None:
            places = torch.tensor(layers, dtype=torch.int64, device=flat.device)  # none on a rank that owns nothing
            self._of = places, torch.tensor(stands_for, dtype=torch.float32, device=flat.device)
        return flat


def _layer_of(name: str, otherwise: int) -> int:
    return int(name.split(".")[1]) if name.startswith("blocks.") else otherwise


class AsyncHostCopy:
    """Values on their way from the device to the host; nobody waits before they are read.

    Args:
        values: scalars and small tensors by key.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.shapes = {key: tuple(value.shape) for key, value in values.items()}
        found = [value.detach() for value in values.values()]
        small = all(value.dim() == 0 and value.dtype == torch.float32 for value in found)
        flat = torch.stack(found) if small else torch.cat([value.reshape(-1).float() for value in found])
        self._landed: Any = None
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._landed = torch.cuda.Event()
            self._landed.record()
        else:
            self._host = flat

    def values(self) -> dict[str, Any]:
        """Numbers and lists of them by key; waits where they are still on their way."""
        if self._landed is not None:
            self._landed.synchronize()
        flat, found, at = self._host.numpy().tolist(), {}, 0
        for key, shape in self.shapes.items():
            size = math.prod(shape)
            part = flat[at : at + size]
            found[key] = part[0] if not shape else part
            if len(shape) == 2:
                found[key] = [part[n : n + shape[1]] for n in range(0, size, shape[1])]
            at += size
        return found
