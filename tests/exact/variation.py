"""RWKV-4 with parameters that are not trained: an unused vector in the first block, a frozen embedding and decay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rwkv_train.models import ModelConfig, rwkv4
from rwkv_train.models.recipe import RecipeRow, constant

UNUSED = "blocks.0.att.v0"
FROZEN = ("emb.weight", "blocks.0.att.time_decay", "blocks.1.att.time_decay")
NOT_TRAINED = {UNUSED, *FROZEN}


class Variation(rwkv4.RWKV4):
    """With a vector that nothing reads, as RWKV-7 has it in its first block.

    Args:
        declared: whether the recipe says that the vector is not trained.
    """

    def __init__(self, declared: bool) -> None:
        frozen = (r"emb\.weight", r"blocks\.\d+\.att\.time_decay")
        rows = (replace(row, not_trained="|".join(frozen)) for row in rwkv4.RWKV4.recipe)
        grown = (
            *rows,
            RecipeRow(r"blocks\.0\.att\.v0", constant(0.5), decay=True, not_trained=".*" if declared else "(?!)"),
        )
        self.recipe = grown  # type: ignore[misc, assignment]

    def block(self, config: ModelConfig, layer: int) -> nn.Module:
        block = super().block(config, layer)
        if layer == 0:
            block.get_submodule("att").register_parameter("v0", nn.Parameter(torch.empty(config.n_embd)))
        return block


def install(patch: pytest.MonkeyPatch | None = None, declared: bool = True) -> None:
    """Registers the variation as RWKV-4; without `patch`, for the rest of this process."""
    (patch or pytest.MonkeyPatch()).setattr(rwkv4, "ARCHITECTURE", Variation(declared))


def install_undeclared() -> None:
    install(declared=False)
