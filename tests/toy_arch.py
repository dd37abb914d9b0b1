"""An architecture added as CONTRIBUTING describes: RWKV-4 without token shift, with parameters of (heads, N).

As in RWKV-7, later layers mix in the values of the first one, and the first one has a parameter that it does not use.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_train import ops
from rwkv_train.models.architecture import (
    Architecture,
    Context,
    LayerStatistic,
    OfOutput,
    OfParameter,
    OfState,
    quantiles,
)
from rwkv_train.models.backbone import ResidualBlock
from rwkv_train.models.config import ModelConfig
from rwkv_train.models.recipe import Orthogonal, RecipeRow, constant, curve, uniform
from rwkv_train.models.registry import (
    ARCHITECTURES,
    HALF_LIFE,
    STATE_RMS,
    LayerChart,
    Registration,
    Shapes,
    common_shape,
)
from rwkv_train.models.rwkv4 import content, half_lives
from rwkv_train.ops import reference


class LayerState(NamedTuple):
    wkv: Tensor  # (B, 3, C) float32


class TimeMix(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, N, self.layer = config.n_embd, config.head_size or 1, layer
        self.decay, self.bonus = nn.Parameter(torch.empty(C // N, N)), nn.Parameter(torch.empty(C // N, N))
        self.first = nn.Parameter(torch.empty(C))  # share of the first layer's values; not used in the first layer
        self.key, self.value, self.output = (nn.Linear(C, C, bias=False) for _ in range(3))

    def forward(self, x: Tensor, wkv: Tensor | None, context: Context) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        k, v, shared = self.key(x), self.value(x), context.shared
        if self.layer == 0:
            shared = {**shared, "v_first": v}
        else:
            v = v + (shared["v_first"] - v) * torch.sigmoid(self.first).to(v)
        y, wkv = ops.wkv4(-torch.exp(self.decay.flatten()), self.bonus.flatten(), k, v, wkv, context.starts)
        return self.output(y), wkv, shared


class ChannelMix(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.dim_ffn is not None
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(ops.relu_squared(self.key(x)))  # type: ignore[no-any-return]


class Block(ResidualBlock):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, TimeMix(config, layer), ChannelMix(config))

    def forward(
        self, x: Tensor, state: LayerState | None, context: Context
    ) -> tuple[Tensor, LayerState, dict[str, Tensor]]:
        y, wkv, shared = self.att(self.ln1(x), None if state is None else state.wkv, context)
        x = x + y
        return x + self.ffn(self.ln2(x)), LayerState(wkv), shared


class Toy(Architecture):
    recipe = (
        RecipeRow(r"emb\.weight", uniform(1e-4), decay=True),
        RecipeRow(r".*\bln\w+\.weight", constant(1.0)),
        RecipeRow(r".*\bln\w+\.bias", constant(0.0)),
        RecipeRow(r".*\.decay", curve(lambda c, C, site: -5 + 8 * c / (C - 1)), lr=2.0),
        RecipeRow(r".*\.(bonus|first)", constant(0.3)),
        RecipeRow(r"head\.weight|.*\.key\.weight", Orthogonal(0.5, tall_factor=False), decay=True, product=True),
        RecipeRow(r".*\.(value|output)\.weight", Orthogonal(0.1, tall_factor=False), decay=True, product=True),
    )
    state_parts = ("wkv state",)
    statistics: ClassVar[Mapping[str, LayerStatistic]] = {
        "layers/state_rms": OfState(lambda state: content(state.wkv).square().mean(), root=True),
        "layers/active": OfOutput("ffn.key", lambda k: (k > 0).float().mean()),
        "decay/half_life": OfParameter("att.decay", lambda decay: quantiles(half_lives(decay).flatten(1))),
    }

    def complete(self, config: ModelConfig) -> ModelConfig:
        return super().complete(replace(config, head_size=config.head_size or 8))

    def block(self, config: ModelConfig, layer: int) -> nn.Module:
        return Block(config, layer)

    def empty_state(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        return LayerState(reference.initial_state(torch.empty(batch, 1, config.n_embd, dtype=dtype, device=device)))


ARCHITECTURE = Toy()


def recognise(shapes: Shapes) -> ModelConfig:
    return replace(common_shape("toy", shapes), head_size=shapes["blocks.0.att.bonus"][1])


REGISTRATION = Registration(
    "tests.toy_arch",
    recognise,
    settings=frozenset({"head_size"}),
    charts={
        "layers/state_rms": STATE_RMS,
        "layers/active": LayerChart("Active channels", "share", "share of the feed-forward channels above zero"),
        "decay/half_life": HALF_LIFE,
    },
)


def register() -> None:
    """Adds the entry for the rest of this process."""
    ARCHITECTURES["toy"] = REGISTRATION


def register_strictly() -> None:
    """The same, and torch's warning about the values that blocks hand on is an error unless training ignores it."""
    register()
    warnings.filterwarnings("error", "FSDP2-wrapped module")
