"""RWKV-4 with parameters that are not trained: an unused vector in the first block, a frozen embedding and decay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rwkv_train.models import rwkv4
from rwkv_train.models.backbone import ModelConfig
from rwkv_train.models.recipe import RecipeRow, constant

UNUSED = "blocks.0.att.v0"
FROZEN = ("emb.weight", "blocks.0.att.time_decay", "blocks.1.att.time_decay")
NOT_TRAINED = {UNUSED, *FROZEN}


class TimeMix(rwkv4.TimeMix):
    """With a vector that nothing reads, as RWKV-7 has it in its first block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        if layer == 0:
            self.v0 = nn.Parameter(torch.empty(config.n_embd))


def _rows(declared: bool) -> tuple[RecipeRow, ...]:
    frozen = (r"emb\.weight", r"blocks\.\d+\.att\.time_decay")
    rows = (replace(row, trained=row.names not in frozen) for row in rwkv4.RECIPE)
    return *rows, RecipeRow(r"blocks\.0\.att\.v0", constant(0.5), decay=True, trained=not declared)


def install(patch: pytest.MonkeyPatch | None = None, declared: bool = True) -> None:
    """Puts the variation in the place of RWKV-4; without a patch for the rest of this process.

    Args:
        patch: takes it back.
        declared: whether the recipe says that the vector is not trained.
    """
    patch = patch or pytest.MonkeyPatch()
    patch.setattr(rwkv4, "RECIPE", _rows(declared))
    patch.setattr(rwkv4, "TimeMix", TimeMix)


def install_undeclared() -> None:
    install(declared=False)
