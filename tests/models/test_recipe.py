"""Initial values for parameters of every shape."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rwkv_train.models.config import ModelConfig
from rwkv_train.models.recipe import Orthogonal, RecipeRow, Site, curve, initial_value


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8), (2, 4)])
def test_a_curve_counts_all_channels_in_row_major_order(shape: tuple[int, ...]) -> None:
    row = RecipeRow("a", curve(lambda c, C, site: c / (C - 1)))
    value = initial_value("a", torch.Size(shape), row, ModelConfig("rwkv4", 1, 8, 9), seed=1)
    assert value.shape == shape
    assert value.flatten().tolist() == [pytest.approx(c / 7) for c in range(8)]


def test_a_curve_knows_the_head_size() -> None:
    """RWKV-7's zigzag has one period in each head."""

    def formula(c: Tensor, C: int, site: Site) -> Tensor:
        assert site.head_size is not None
        return c % site.head_size + 10 * site.layer

    row = RecipeRow(r".*a", curve(formula))
    config = ModelConfig("rwkv4", 3, 8, 9, head_size=4)
    value = initial_value("blocks.2.a", torch.Size((1, 1, 8)), row, config, seed=1)
    assert value.flatten().tolist() == [20, 21, 22, 23, 20, 21, 22, 23]


@pytest.mark.parametrize("tall_factor", [True, False])
@pytest.mark.parametrize("shape", [(32, 8), (8, 32), (8, 8)])
def test_orthogonal_has_the_gain_that_is_asked_for(shape: tuple[int, int], tall_factor: bool) -> None:
    value = Orthogonal(0.5, tall_factor)(torch.Size(shape), Site(0, 1), torch.Generator().manual_seed(1))
    gain = 0.5 * (math.sqrt(shape[0] / shape[1]) if tall_factor and shape[0] > shape[1] else 1.0)
    assert torch.linalg.svdvals(value.double()).tolist() == [pytest.approx(gain, rel=1e-5)] * min(shape)
