"""RWKV-4: time mix, channel mix and recipe of "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048)."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    wide,
)
from rwkv_train.models.backbone import ResidualBlock
from rwkv_train.models.config import ModelConfig
from rwkv_train.models.recipe import Orthogonal, RecipeRow, Site, constant, curve, uniform
from rwkv_train.ops import reference

SATURATION = math.log(0.98 / 0.02)  # |r| above it: the gate σ(r) is below 0.02 or above 0.98


class LayerState(NamedTuple):
    """What one block remembers of the past, in the order in which it computes it."""

    att_x: Tensor  # (B, C) last input of the time mix (after ln1), for its token shift
    wkv: Tensor  # (B, 3, C) float32: numerator, denominator and running maximum of wkv
    ffn_x: Tensor  # (B, C) last input of the channel mix (after ln2)


def _mix(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, channels))


class TimeMix(nn.Module):
    """Time mixing, in place of attention: o = W_o (σ(r) ⊙ wkv(k, v)), equations (11) to (17) of the paper."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        channels = config.n_embd
        self.time_decay = nn.Parameter(torch.empty(channels))
        self.time_first = nn.Parameter(torch.empty(channels))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = _mix(channels), _mix(channels), _mix(channels)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.output = nn.Linear(channels, channels, bias=False)

    def forward(
        self, x: Tensor, last: Tensor | None, wkv: Tensor | None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C); last (B, C) the input before it; wkv (B, 3, C) → output (B, T, C), new last, new wkv.

        At `starts` (B, T) a document begins: nothing of what came before is known there.
        """
        x_k, x_v, x_r = ops.shift_mix(x, last, self.time_mix_k, self.time_mix_v, self.time_mix_r, starts=starts)
        k, v, r = self.key(x_k), self.value(x_v), self.receptance(x_r)
        y, wkv = ops.wkv4(-torch.exp(wide(self.time_decay)), self.time_first, k, v, wkv, starts)
        return self.output(ops.sigmoid_gate(r, y)), x[:, -1], wkv


class ChannelMix(nn.Module):
    """The feed-forward part: σ(r) ⊙ W_v relu(k)², equation (18) of the paper."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        channels = config.n_embd
        width = config.dim_ffn
        assert width is not None, "the architecture completes the config"
        self.time_mix_k, self.time_mix_r = _mix(channels), _mix(channels)
        self.key = nn.Linear(channels, width, bias=False)
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor, last: Tensor | None, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, C); last (B, C) the input before it; starts as above → output (B, T, C), new last."""
        x_k, x_r = ops.shift_mix(x, last, self.time_mix_k, self.time_mix_r, starts=starts)
        k, r = ops.relu_squared(self.key(x_k)), self.receptance(x_r)
        return ops.sigmoid_gate(r, self.value(k)), x[:, -1]


class Block(ResidualBlock):
    """A residual block: time mix, then channel mix."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, TimeMix(config, layer), ChannelMix(config, layer))

    def forward(
        self, x: Tensor, state: LayerState | None, context: Context
    ) -> tuple[Tensor, LayerState, dict[str, Tensor]]:
        """x (B, T, C) and the state before it → the same after it, and what the next block is handed: nothing."""
        att_x, wkv, ffn_x = state if state is not None else (None, None, None)
        y, att_x, wkv = self.att(self.ln1(x), att_x, wkv, context.starts)
        x = x + y
        y, ffn_x = self.ffn(self.ln2(x), ffn_x, context.starts)
        return x + y, LayerState(att_x, wkv, ffn_x), context.shared


def _time_decay(c: Tensor, C: int, site: Site) -> Tensor:
    return -5 + 8 * (c / max(C - 1, 1)) ** (0.7 + 1.3 * site.rho0)


def _time_first(c: Tensor, C: int, site: Site) -> Tensor:
    return math.log(0.3) + 0.5 * ((c + 1) % 3 - 1)


def content(wkv: Tensor) -> Tensor:
    """What a state (…, 3, C) holds, whatever its scale: the weighted mean of the values, (…, C)."""
    return wkv[..., 0, :] / wkv[..., 1, :]


def half_lives(time_decay: Tensor) -> Tensor:
    """After how many tokens half of a value's weight is left, per channel; same shape."""
    return math.log(2) * torch.exp(-wide(time_decay))


class RWKV4(Architecture):
    """Recipe, layer state and statistics of RWKV-4."""

    recipe = (
        RecipeRow(r"emb\.weight", uniform(1e-4), decay=True),
        RecipeRow(r"head\.weight", Orthogonal(0.5, tall_factor=True), decay=True, product=True),
        RecipeRow(r".*\bln\w+\.weight", constant(1.0)),
        RecipeRow(r".*\bln\w+\.bias", constant(0.0)),
        RecipeRow(r"blocks\.\d+\.att\.time_decay", curve(_time_decay), lr=2.0),
        RecipeRow(r"blocks\.\d+\.att\.time_first", curve(_time_first), lr=3.0),
        RecipeRow(r"blocks\.\d+\.(att|ffn)\.time_mix_k", curve(lambda c, C, site: (c / C) ** site.rho1)),
        RecipeRow(r"blocks\.\d+\.att\.time_mix_v", curve(lambda c, C, site: (c / C) ** site.rho1 + 0.3 * site.rho0)),
        RecipeRow(r"blocks\.\d+\.att\.time_mix_r", curve(lambda c, C, site: (c / C) ** (0.5 * site.rho1))),
        RecipeRow(r"blocks\.\d+\.ffn\.time_mix_r", curve(lambda c, C, site: (c / C) ** site.rho1)),
        RecipeRow(r"blocks\.\d+\.att\.value\.weight", Orthogonal(1.0, tall_factor=True), decay=True, product=True),
        RecipeRow(r"blocks\.\d+\.att\.(key|receptance|output)\.weight", constant(0.0), decay=True, product=True),
        RecipeRow(r"blocks\.\d+\.ffn\.key\.weight", Orthogonal(1.0, tall_factor=True), decay=True, product=True),
        RecipeRow(r"blocks\.\d+\.ffn\.(receptance|value)\.weight", constant(0.0), decay=True, product=True),
    )
    state_parts = ("time mix's input", "wkv state", "channel mix's input")
    statistics: ClassVar[Mapping[str, LayerStatistic]] = {
        "layers/state_rms": OfState(lambda state: content(state.wkv).float().square().mean(), root=True),
        "layers/receptance_saturated": OfOutput("att.receptance", lambda r: (r.abs() > SATURATION).sum() / r.numel()),
        "decay/half_life": OfParameter("att.time_decay", lambda time_decay: quantiles(half_lives(time_decay))),
    }

    def block(self, config: ModelConfig, layer: int) -> nn.Module:
        return Block(config, layer)

    def empty_state(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        shift = torch.zeros(batch, config.n_embd, dtype=dtype, device=device)
        wkv = reference.initial_state(shift[:, None])
        return LayerState(shift, wkv, shift.clone())


ARCHITECTURE = RWKV4()
