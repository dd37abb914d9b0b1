"""A step is judged from a few bytes, whatever the size of the model's state."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rwkv_train.models import State
from rwkv_train.training.step_verdict import StepVerdict


class LayerState(NamedTuple):
    """A vector and a matrix per head, as from RWKV-5 on."""

    shift: Tensor  # (B, C)
    matrices: Tensor  # (B, H, N, N)


def state(layers: int, batch: int, heads: int) -> State:
    return State(tuple(LayerState(torch.ones(batch, 8), torch.ones(batch, heads, 16, 16)) for _ in range(layers)))


def begun() -> StepVerdict:
    verdict = StepVerdict()
    verdict.begin_step(torch.device("cpu"))
    return verdict


def kept_bytes(heads: int) -> int:
    """Bytes of all tensors that are alive after two micro-batches because the verdict refers to them."""
    gc.collect()
    before = {id(value) for value in gc.get_objects() if type(value) is Tensor}
    verdict = begun()
    for _ in range(2):
        verdict.record_microbatch(torch.tensor(1.0), state(3, 4, heads))
    gc.collect()
    alive = [value for value in gc.get_objects() if type(value) is Tensor and id(value) not in before]
    assert len(verdict.finite) == 2
    return sum(value.untyped_storage().nbytes() for value in alive)


def test_what_is_kept_does_not_grow_with_the_state() -> None:
    assert kept_bytes(64) == kept_bytes(1) < 200


def test_the_bad_sample_is_known() -> None:
    verdict, bad = begun(), state(3, 4, 2)
    bad.layers[1].matrices[2, 0, 3, 3] = math.inf
    bad.layers[2].shift[0, 1] = math.nan
    verdict.record_microbatch(torch.tensor(1.0), bad)
    assert (~verdict.finite[0]).nonzero().tolist() == [[0, 2, 0], [1, 1, 2]]


@pytest.mark.parametrize(
    ("losses", "norm", "limit", "bad"),
    [
        ([1.0, 2.0], 1.0, math.inf, False),
        ([1.0, 2.0], 1.0, 1.4, True),
        ([1.0, math.nan], 1.0, math.inf, True),
        ([1.0], math.inf, math.inf, True),
        ([1.0], math.nan, math.inf, True),
    ],
)
def test_what_is_bad(losses: list[float], norm: float, limit: float, bad: bool) -> None:
    verdict = begun()
    verdict.count_skipped_from(3)
    verdict.set_limit(limit)
    for loss in losses:
        verdict.record_microbatch(torch.tensor(loss), state(1, 1, 1))
    assert bool(verdict.judge(torch.tensor(norm))) == bad
    verdict.after_step(torch.tensor(norm))
    assert verdict.skipped is not None
    assert float(verdict.skipped) == 3 + bad


def test_a_norm_that_is_known_after_the_step() -> None:
    verdict = begun()
    verdict.record_microbatch(torch.tensor(1.0), state(1, 1, 1))
    assert not bool(verdict.judge(None))
    verdict.after_step(torch.tensor(math.inf))
    assert verdict.bad is not None
    assert bool(verdict.bad)


def judged_text(rank: int, ranks: int) -> list[float]:
    verdict = begun()
    for micro in range(2):
        text = torch.tensor([3.0 + rank, 10.0 * rank + micro], dtype=torch.float64)
        verdict.record_microbatch(torch.tensor(1.0), state(1, 1, 1), text)
    verdict.judge(torch.tensor(1.0))
    assert verdict.text is not None
    return list(verdict.text.tolist())


def test_the_predicted_text_is_that_of_all_ranks(run_ranks: Callable[..., list[Any]]) -> None:
    """3 + 3 tokens of the first rank and 4 + 4 of the second; 0 + 1 and 10 + 11 bytes."""
    assert run_ranks(judged_text, 2) == [[14.0, 22.0]] * 2
    verdict = begun()
    verdict.record_microbatch(torch.tensor(1.0), state(1, 1, 1))
    verdict.judge(torch.tensor(1.0))
    assert verdict.text is None
