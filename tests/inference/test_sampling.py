"""Sampling against transformers' own processors of logits, and by hand."""

from __future__ import annotations

import pytest
import torch

from rwkv_train.errors import UserError
from rwkv_train.inference.sampling import Sampling, penalise, probabilities, sample

SETTINGS = [
    Sampling(),
    Sampling(temperature=0.3),
    Sampling(top_k=5),
    Sampling(top_p=0.6),
    Sampling(top_p=0.9, top_k=12, temperature=1.7),
    Sampling(repetition_penalty=1.8),
    Sampling(0.7, 0.8, 20, 1.3),
    Sampling(top_k=1000),
]


def in_transformers(logits: torch.Tensor, sampling: Sampling, seen: list[int]) -> torch.Tensor:
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    tokens = torch.tensor([seen])
    assert isinstance(tokens, torch.LongTensor)
    return torch.softmax(chain(tokens, logits[None])[0], -1)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_probabilities_are_those_of_transformers(sampling: Sampling) -> None:
    logits = 3 * torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = [3, 9, 9, 40]
    ours = probabilities(penalise(logits, sampling.repetition_penalty, set(seen)), sampling)
    torch.testing.assert_close(ours / ours.sum(), in_transformers(logits, sampling, seen), rtol=1e-9, atol=1e-12)


def test_draws_follow_the_probabilities() -> None:
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling, seen: tuple[int, ...] = ()) -> torch.Tensor:
        drawn = [sample(chances.log(), sampling, generator, seen) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    assert shares(Sampling()).numpy() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(Sampling(top_p=0.7)).numpy() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(Sampling(top_k=2)).numpy() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(Sampling(top_p=0.4)).tolist() == [1, 0, 0, 0]  # the likeliest always stays
    assert shares(Sampling(temperature=0)).tolist() == [1, 0, 0, 0]
    assert shares(Sampling(temperature=0, repetition_penalty=3), seen=(0,)).tolist() == [0, 1, 0, 0]
    sharp = chances**2 / (chances**2).sum()
    assert shares(Sampling(temperature=0.5)).numpy() == pytest.approx(sharp.numpy(), abs=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1.0 is out of range\n  valid: 0 or more"),
        ({"temperature": float("nan")}, "--temperature nan is out of range"),
        ({"top_p": 0.0}, "--top-p 0.0 is out of range\n  valid: above 0, up to 1"),
        ({"top_k": -1}, "--top-k -1 is out of range"),
        ({"repetition_penalty": 0.5}, r"--repetition-penalty 0.5 is out of range\n  valid: 1 \(none\) or more"),
    ],
)
def test_what_is_out_of_range_is_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_a_temperature_whose_division_would_overflow_takes_the_likeliest() -> None:
    logits = torch.tensor([0.5, 3.0, -2.0])
    assert [sample(logits, Sampling(temperature)) for temperature in (0, 1e-320, 1e-12)] == [1, 1, 1]
