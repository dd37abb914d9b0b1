"""RWKV-7 "Goose": time mix, channel mix and recipe of arXiv 2503.14456."""

from __future__ import annotations

import math
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
    OfParameter,
    OfState,
    quantiles,
    wide,
)
from rwkv_train.models.backbone import HeadNorm, ResidualBlock
from rwkv_train.models.config import ModelConfig
from rwkv_train.models.recipe import Initialiser, Orthogonal, RecipeRow, Site, constant, curve, uniform
from rwkv_train.ops.reference import LOG_DECAY

HEAD_SIZE = 64
NORM_EPS = 64e-5  # of the group norm of y
# The low-rank matrices by the names of their widths in `extra`: factor of √C in the width's formula.
LOW_RANK = {"decay_low_rank_dim": 2.5, "a_low_rank_dim": 2.5, "v_low_rank_dim": 1.7, "gate_low_rank_dim": 5.0}


class LayerState(NamedTuple):
    """What one block remembers of the past, in the order in which it computes it."""

    att_x: Tensor  # (B, C) last input of the time mix (after ln1), for its token shift
    wkv: Tensor  # (B, H, N, N) float32: the state matrix S of each head, [value, key]
    ffn_x: Tensor  # (B, C) last input of the channel mix (after ln2)


def _vector(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, channels))


def _low_rank(channels: int, width: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.empty(channels, width)), nn.Parameter(torch.empty(width, channels))


class TimeMix(nn.Module):
    """Time mixing by the generalised delta rule, section 4 of the paper.

    S_t = S_{t-1} (diag(w_t) - κ_t (a_t ⊙ κ_t)ᵀ) + v_t k_tᵀ;  o_t = W_o (g_t ⊙ (norm(S_t r_t) + (r_t · (ρ ⊙ k_t)) v_t))
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        channels, self.layer = config.n_embd, layer
        assert config.head_size is not None, "the architecture completes the config"
        self.head_size = config.head_size
        self.x_r, self.x_w, self.x_k = _vector(channels), _vector(channels), _vector(channels)
        self.x_v, self.x_a, self.x_g = _vector(channels), _vector(channels), _vector(channels)
        decay, rate, value, gate = (config.extra[name] for name in LOW_RANK)
        self.w0, (self.w1, self.w2) = _vector(channels), _low_rank(channels, decay)
        self.a0, (self.a1, self.a2) = _vector(channels), _low_rank(channels, rate)
        self.v0, (self.v1, self.v2) = _vector(channels), _low_rank(channels, value)  # the first layer uses none of them
        self.g1, self.g2 = _low_rank(channels, gate)
        self.k_k, self.k_a = _vector(channels), _vector(channels)
        self.r_k = nn.Parameter(torch.empty(channels // self.head_size, self.head_size))
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.output = nn.Linear(channels, channels, bias=False)
        self.ln_x = HeadNorm(channels, self.head_size, NORM_EPS)

    def forward(
        self, x: Tensor, last: Tensor | None, wkv: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """x (B, T, C); last (B, C) the input before it; wkv (B, H, N, N) → output (B, T, C) and the same after it.

        The last result is what the next layer is handed: `v_first` (B, T, C), the values of the first layer.
        """
        mixes = (1 - mix for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g))
        x_r, x_w, x_k, x_v, x_a, x_g = ops.shift_mix(x, last, *mixes, starts=context.starts)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        shared = context.shared
        if self.layer == 0:
            shared = {**shared, "v_first": v}
        else:
            v = ops.rwkv7_values(v, shared["v_first"], (x_v @ self.v1) @ self.v2, self.v0)
        g = torch.sigmoid(x_g @ self.g1) @ self.g2
        w_delta, a_delta = torch.tanh(x_w @ self.w1) @ self.w2, (x_a @ self.a1) @ self.a2
        log_decay, k, a, b = ops.rwkv7_keys(k, w_delta, a_delta, self.w0, self.a0, self.k_k, self.k_a, self.head_size)
        by_head = (*x.shape[:-1], -1, self.head_size)
        r_heads, w_heads, k_heads = r.view(by_head), log_decay.view(by_head), k.view(by_head)
        v_heads, a_heads, b_heads = v.view(by_head), a.view(by_head), b.view(by_head)
        y, wkv = ops.wkv7(r_heads, w_heads, k_heads, v_heads, a_heads, b_heads, wkv, context.starts)
        return self.output(self.ln_x(y.flatten(2), g, (r, k, v, self.r_k))), x[:, -1], wkv, shared


class ChannelMix(nn.Module):
    """The feed-forward part: W_v relu(W_k x_k)²."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.dim_ffn is not None, "the architecture completes the config"
        self.x_k = _vector(config.n_embd)
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor, last: Tensor | None, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, C); last (B, C) the input before it; starts (B, T) → output (B, T, C), new last."""
        (x_k,) = ops.shift_mix(x, last, 1 - self.x_k, starts=starts)
        return self.value(ops.relu_squared(self.key(x_k))), x[:, -1]


class Block(ResidualBlock):
    """A residual block: time mix, then channel mix."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, TimeMix(config, layer), ChannelMix(config, layer))

    def forward(
        self, x: Tensor, state: LayerState | None, context: Context
    ) -> tuple[Tensor, LayerState, dict[str, Tensor]]:
        """x (B, T, C) and the state before it → the same after it, and the values of the first layer."""
        att_x, wkv, ffn_x = state if state is not None else (None, None, None)
        y, att_x, wkv, shared = self.att(self.ln1(x), att_x, wkv, context)
        x = x + y
        y, ffn_x = self.ffn(self.ln2(x), ffn_x, context.starts)
        return x + y, LayerState(att_x, wkv, ffn_x), shared


def _mix(exponent: float) -> Initialiser:
    return curve(lambda c, C, site: 1 - (c / C) ** (exponent * site.rho1))


def _linear(c: Tensor, C: int) -> Tensor:
    """From -0.5 to 0.5 over the channels."""
    return c / max(C - 1, 1) - 0.5


def _zigzag(c: Tensor, site: Site) -> Tensor:
    """From -1 to 1 over the channels of each head, flat in the middle."""
    assert site.head_size is not None
    half = max(site.head_size - 1, 1) / 2
    z = (c % site.head_size - half) / half
    return z * z.abs()


def _w0(c: Tensor, C: int, site: Site) -> Tensor:
    return -6 + 6 * (c / max(C - 1, 1)) ** (1 + math.pow(site.rho0, 0.3)) + 0.5 + 2.5 * _zigzag(c, site)


def half_lives(w0: Tensor) -> Tensor:
    """After how many tokens half of a value's weight is left where the token changes nothing; per channel."""
    return math.log(2) / (-LOG_DECAY * torch.sigmoid(wide(w0)))


class RWKV7(Architecture):
    """Recipe, layer state and statistics of RWKV-7."""

    recipe = (
        RecipeRow(r"emb\.weight", uniform(1e-4), decay=True),
        RecipeRow(r"head\.weight", Orthogonal(0.5, tall_factor=True), decay=True, product=True),
        RecipeRow(r".*\bln(\d|_out)\.weight", constant(1.0)),
        RecipeRow(r".*\bln\w+\.bias", constant(0.0)),
        RecipeRow(r".*\.ln_x\.weight", curve(lambda c, C, site: ((1 + site.layer) / site.n_layer) ** 0.7 + 0 * c)),
        RecipeRow(r".*\.att\.x_[rg]", _mix(0.2)),
        RecipeRow(r".*\.att\.x_[wa]", _mix(0.9)),
        RecipeRow(r".*\.att\.x_[kv]", _mix(0.7)),
        RecipeRow(r".*\.ffn\.x_k", curve(lambda c, C, site: 1 - (c / C) ** site.rho1**4)),
        RecipeRow(r".*\.w0", curve(_w0), lr=2.0),
        RecipeRow(r".*\.a0", curve(lambda c, C, site: -0.19 + 0.3 * _zigzag(c, site) + 0.4 * _linear(c, C))),
        RecipeRow(r".*\.v0", curve(lambda c, C, site: 0.73 - 0.4 * _linear(c, C)), not_trained=r"blocks\.0\..*"),
        RecipeRow(r".*\.[wag]1", constant(0.0), product=True),
        RecipeRow(r".*\.[wag]2", Orthogonal(0.1, tall_factor=True), product=True),
        RecipeRow(r".*\.v1", constant(0.0), product=True, not_trained=r"blocks\.0\..*"),
        RecipeRow(r".*\.v2", Orthogonal(0.1, tall_factor=True), product=True, not_trained=r"blocks\.0\..*"),
        RecipeRow(r".*\.k_k", curve(lambda c, C, site: 0.71 - 0.1 * _linear(c, C))),
        RecipeRow(r".*\.k_a", constant(1.02)),
        RecipeRow(r".*\.r_k", constant(-0.04)),
        RecipeRow(
            r".*\.(receptance|att\.value|ffn\.key)\.weight",
            Orthogonal(1.0, tall_factor=False),
            decay=True,
            product=True,
        ),
        RecipeRow(r".*\.att\.key\.weight", Orthogonal(0.1, tall_factor=False), decay=True, product=True),
        RecipeRow(r".*\.(output|ffn\.value)\.weight", constant(0.0), decay=True, product=True),
    )
    state_parts = ("time mix's input", "wkv state", "channel mix's input")
    statistics: ClassVar[Mapping[str, LayerStatistic]] = {
        "layers/state_rms": OfState(lambda state: state.wkv.square().mean(), root=True),
        "decay/half_life": OfParameter("att.w0", lambda w0: quantiles(half_lives(w0).flatten(1))),
    }

    def complete(self, config: ModelConfig) -> ModelConfig:
        """The config with heads of 64, and the widths of the authors' formula for those that are not given."""
        widths = {name: max(32, 32 * round(factor * config.n_embd**0.5 / 32)) for name, factor in LOW_RANK.items()}
        head_size = HEAD_SIZE if config.head_size is None else config.head_size
        return super().complete(replace(config, head_size=head_size, extra={**widths, **config.extra}))

    def block(self, config: ModelConfig, layer: int) -> nn.Module:
        return Block(config, layer)

    def empty_state(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        assert config.head_size is not None
        shift = torch.zeros(batch, config.n_embd, dtype=dtype, device=device)
        size = (batch, config.n_embd // config.head_size, config.head_size, config.head_size)
        wkv = torch.zeros(size, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return LayerState(shift, wkv, shift.clone())


ARCHITECTURE = RWKV7()
