"""How the next token is drawn from its logits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_train.errors import UserError

_COLDEST = 1e-9  # below it the likeliest token is taken, as at 0: the division would overflow


@dataclass(frozen=True)
class Sampling:
    """What is done to the logits before a token is drawn, in this order (which is transformers' order too).

    Args:
        repetition_penalty: at least 1: logits of tokens that were read or generated are divided by it where they are
            positive and multiplied where they are negative (CTRL, arXiv 1909.05858); 1: none.
        temperature: logits are divided by it; 0: the likeliest token is taken.
        top_k: only so many of the likeliest tokens stay; 0: all.
        top_p: of these only the smallest set with this much of the probability, 0 < top_p ≤ 1 (nucleus sampling,
            arXiv 1904.09751).

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, holds, range_ in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top-p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("top-k", self.top_k >= 0, "0 (all) or more"),
            ("repetition-penalty", 1 <= self.repetition_penalty < float("inf"), "1 (none) or more"),
        ):
            if not holds:
                value = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name} {value} is out of range", f"valid: {range_}")


def penalise(logits: Tensor, penalty: float, seen: Collection[int]) -> Tensor:
    """Logits (V) with the penalty for the tokens that were seen; a copy where there is one."""
    if penalty == 1 or not seen:
        return logits
    index = torch.tensor(list(seen))
    before = logits[index]
    return logits.index_copy(0, index, torch.where(before > 0, before / penalty, before * penalty))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from at a temperature above 0: (V) float64, not normalised; what may not be drawn is 0."""
    chances = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    if 0 < sampling.top_k < len(chances):
        dropped = torch.ones_like(chances, dtype=torch.bool)
        dropped[chances.topk(sampling.top_k).indices] = False
        chances[dropped] = 0
    if sampling.top_p < 1:
        ordered, index = chances.sort(descending=True)
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p * chances.sum()  # the likeliest always stays
        chances[index[dropped]] = 0
    return chances


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None, seen: Collection[int] = ()
) -> int:
    """Draws a token.

    Args:
        logits: (V), on the CPU.
        sampling: how.
        generator: of the draws.
        seen: the tokens that a repetition penalty is for.
    """
    logits = penalise(logits, sampling.repetition_penalty, seen)
    if sampling.temperature < _COLDEST:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, sampling), 1, generator=generator))
