"""Weights made by several ranks are those of one, to the bit, whatever ranges they need."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from rwkv_train.checkpoint.shards import WEIGHT, StateShard
from rwkv_train.models import ModelConfig, build_model, recipe_of
from rwkv_train.models.recipe import Orthogonal
from rwkv_train.models.weights import shapes_of
from rwkv_train.training.initial_weights import Recipe, rounds

SHAPE = ModelConfig("rwkv4", 2, 24, 40)


Held = dict[str, tuple[int, npt.NDArray[np.float32]]]  # name → first element, values; a pipe carries arrays


def fill(rank: int, ranks: int, whole: bool) -> Held:
    """What this rank gets: all of each tensor, or ranges that overlap between ranks, in two shards each."""
    model = build_model(SHAPE, device="meta")
    shapes = shapes_of(dict(model.named_parameters()))
    held: dict[str, tuple[int, Tensor]] = {}
    shards = []
    for name, parameter in model.named_parameters():
        numel = parameter.numel()
        start, stop = (0, numel) if whole else (rank * numel // (ranks + 1), (rank + 2) * numel // (ranks + 1))
        values = torch.full((stop - start,), torch.nan)
        held[name] = (start, values)
        middle = len(values) // 2
        shards.append(StateShard(WEIGHT, name, start, values[:middle], True))
        shards.append(StateShard(WEIGHT, name, start + middle, values[middle:], True))
    torch.set_num_threads(1 + rank)
    Recipe(recipe_of(model), shapes, SHAPE, seed=3).fill(shards)
    return {name: (start, values.numpy()) for name, (start, values) in held.items()}


@pytest.mark.parametrize("whole", [True, False])
def test_three_ranks_make_the_weights_of_one(run_ranks: Callable[..., list[Held]], whole: bool) -> None:
    expected = dict(build_model(SHAPE, seed=3).named_parameters())
    for held in run_ranks(fill, 3, whole):
        for name, (start, values) in held.items():
            assert torch.equal(
                torch.from_numpy(values), expected[name].detach().flatten()[start : start + len(values)]
            ), name


def test_the_work_is_shared_out() -> None:
    """14b's matrices over 8 ranks: none does more than a seventh of it, and each is made once."""
    model = build_model(ModelConfig("rwkv4", 40, 5120, 50277), device="meta")
    rows = recipe_of(model)
    work = {n: init.work(p.shape) for n, p in model.named_parameters() if isinstance(init := rows[n].init, Orthogonal)}
    found = rounds(work, 8)
    names = [name for makers in found for name in makers if name is not None]
    assert sorted(names) == sorted(work)
    loads = [sum(work[makers[rank] or ""] for makers in found if makers[rank] is not None) for rank in range(8)]
    assert max(loads) <= sum(work.values()) / 7
