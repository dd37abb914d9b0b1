"""What an architecture brings: its blocks, recipe and layer state, and everything else in which it differs.

Nothing outside the architecture's own module names its tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_train.models.config import ModelConfig
from rwkv_train.models.recipe import RecipeRow
from rwkv_train.models.registry import unknown_settings
from rwkv_train.models.state import LayerState, State

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)  # of the channels of a layer, where a statistic has a value for each


class Context(NamedTuple):
    """What the blocks of one forward pass have in common.

    Args:
        starts: (B, T) bool, where documents begin; None: each row continues from its state.
        shared: values that blocks hand to those after them, such as the first layer's values in RWKV-7. A block does
            not change it: it returns the dict that the next block gets.
    """

    starts: Tensor | None
    shared: dict[str, Tensor]


@dataclass(frozen=True)
class OfState:
    """A per-layer value measured on the layer's state at the end of each micro-batch.

    Args:
        measure: the layer's state → a value (); its mean over micro-batches and ranks is logged.
        root: whether the square root of the mean is logged instead.
    """

    measure: Callable[[LayerState], Tensor]
    root: bool = False


@dataclass(frozen=True)
class OfOutput:
    """A per-layer value measured on what a module of the block returns; absent where torch.compile is used.

    Args:
        module: its name in the block.
        measure: its output → a value (); its mean over micro-batches and ranks is logged.
    """

    module: str
    measure: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OfParameter:
    """A per-layer value measured on a parameter of the block, after the step.

    Args:
        parameter: its name in the block.
        measure: the parameter of all layers (L, …) → their values (L) or (L, numbers).
    """

    parameter: str
    measure: Callable[[Tensor], Tensor]


LayerStatistic = OfState | OfOutput | OfParameter


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def quantiles(values: Tensor) -> Tensor:
    """QUANTILES of each row of (L, channels), float32 (L, 5)."""
    return torch.quantile(values.float(), torch.tensor(QUANTILES, device=values.device), dim=1).t()


class Architecture(ABC):
    """One architecture. Its shape, parameter names and initial values are those of published checkpoints.

    Attributes:
        recipe: each parameter's initial value, learning-rate multiplier and weight decay; see recipe.py.
        state_parts: what each field of the layer's state is, for messages, in the order of the fields, which is the
            order in which a block computes them.
        statistics: per-layer values beyond those of every architecture, by key of metrics.jsonl. Their texts are in
            registry.py.
    """

    recipe: ClassVar[tuple[RecipeRow, ...]]
    state_parts: ClassVar[tuple[str, ...]]
    statistics: ClassVar[Mapping[str, LayerStatistic]] = {}

    @abstractmethod
    def block(self, config: ModelConfig, layer: int) -> nn.Module:
        """A block. Its forward takes x (B, T, C), its state or None, and a Context.

        It returns x, its state after the last token, and the `shared` dict for the next block. A module `ln0` of the
        first block, where it has one, is applied to the embedding.
        """

    @abstractmethod
    def empty_state(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """The state of a layer that has read nothing; `dtype` is that of activations."""

    def complete(self, config: ModelConfig) -> ModelConfig:
        """The config with the architecture's defaults in place of None.

        Raises:
            ValueError: a size that is not positive, one that the architecture does not know, or channels that are no
                multiple of the head size.
        """
        sizes = {name: getattr(config, name) for name in ("n_layer", "n_embd", "vocab_size", "dim_ffn", "head_size")}
        for name, value in {**sizes, **config.extra}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if unknown := unknown_settings(config):
            raise ValueError(f"arch {config.arch} has no {', '.join(unknown)}")
        if config.head_size is not None and config.n_embd % config.head_size:
            raise ValueError(f"n_embd is {config.n_embd}; it must be a multiple of head_size, {config.head_size}")
        return config if config.dim_ffn is not None else replace(config, dim_ffn=4 * config.n_embd)

    def flops_per_token(self, config: ModelConfig, matmul_parameters: int, context: int) -> int:
        """FLOPs of the forward and backward pass for one token of a context of that length.

        6 for each parameter that takes part in a matrix product (forward 2, backward 4); an architecture adds what its
        recurrence or attention costs where that is no small part.
        """
        return 6 * matmul_parameters

    def blank(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state of a model that has read nothing."""
        return State(tuple(self.empty_state(config, batch, device, dtype) for _ in range(config.n_layer)))

    def state_bytes(self, config: ModelConfig) -> int:
        """Bytes of the state of one sequence, where activations are float32."""
        return self.blank(config, 1, torch.device("meta"), torch.float32).row_bytes()
