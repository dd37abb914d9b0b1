"""RWKV-4: time mix, channel mix and recipe of "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rwkv_train import ops
from rwkv_train.models.backbone import ModelConfig
from rwkv_train.models.recipe import Orthogonal, RecipeRow, Site, constant, curve, uniform


def _mix(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, channels))


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class TimeMix(nn.Module):
    """Attention's place: o = W_o (σ(r) ⊙ wkv(k, v)), equations (11) to (17) of the paper."""

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
        y, wkv = ops.wkv4(-torch.exp(_wide(self.time_decay)), self.time_first, k, v, wkv, starts)
        return self.output(ops.sigmoid_gate(r, y)), x[:, -1], wkv

    @staticmethod
    def content(wkv: Tensor) -> Tensor:
        """What a state (…, 3, C) holds, whatever its scale: the weighted mean of the values, (…, C)."""
        return wkv[..., 0, :] / wkv[..., 1, :]

    @staticmethod
    def half_lives(time_decay: Tensor) -> Tensor:
        """After how many tokens half of a value's weight is left, per channel; same shape."""
        return math.log(2) * torch.exp(-_wide(time_decay))


class ChannelMix(nn.Module):
    """The feed-forward part: σ(r) ⊙ W_v relu(k)², equation (18) of the paper."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        channels = config.n_embd
        width = config.dim_ffn or 4 * channels
        self.time_mix_k, self.time_mix_r = _mix(channels), _mix(channels)
        self.key = nn.Linear(channels, width, bias=False)
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor, last: Tensor | None, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, C); last (B, C) the input before it; starts as above → output (B, T, C), new last."""
        x_k, x_r = ops.shift_mix(x, last, self.time_mix_k, self.time_mix_r, starts=starts)
        k, r = ops.relu_squared(self.key(x_k)), self.receptance(x_r)
        return ops.sigmoid_gate(r, self.value(k)), x[:, -1]


def _time_decay(c: Tensor, C: int, site: Site) -> Tensor:
    return -5 + 8 * (c / max(C - 1, 1)) ** (0.7 + 1.3 * site.rho0)


def _time_first(c: Tensor, C: int, site: Site) -> Tensor:
    return math.log(0.3) + 0.5 * ((c + 1) % 3 - 1)


RECIPE = (
    RecipeRow(r"emb\.weight", uniform(1e-4), decay=True),
    RecipeRow(r"head\.weight", Orthogonal(0.5), decay=True),
    RecipeRow(r".*\bln\w+\.weight", constant(1.0)),
    RecipeRow(r".*\bln\w+\.bias", constant(0.0)),
    RecipeRow(r"blocks\.\d+\.att\.time_decay", curve(_time_decay), lr=2.0),
    RecipeRow(r"blocks\.\d+\.att\.time_first", curve(_time_first), lr=3.0),
    RecipeRow(r"blocks\.\d+\.(att|ffn)\.time_mix_k", curve(lambda c, C, site: (c / C) ** site.rho1)),
    RecipeRow(r"blocks\.\d+\.att\.time_mix_v", curve(lambda c, C, site: (c / C) ** site.rho1 + 0.3 * site.rho0)),
    RecipeRow(r"blocks\.\d+\.att\.time_mix_r", curve(lambda c, C, site: (c / C) ** (0.5 * site.rho1))),
    RecipeRow(r"blocks\.\d+\.ffn\.time_mix_r", curve(lambda c, C, site: (c / C) ** site.rho1)),
    RecipeRow(r"blocks\.\d+\.att\.value\.weight", Orthogonal(1.0), decay=True),
    RecipeRow(r"blocks\.\d+\.att\.(key|receptance|output)\.weight", constant(0.0), decay=True),
    RecipeRow(r"blocks\.\d+\.ffn\.key\.weight", Orthogonal(1.0), decay=True),
    RecipeRow(r"blocks\.\d+\.ffn\.(receptance|value)\.weight", constant(0.0), decay=True),
)
