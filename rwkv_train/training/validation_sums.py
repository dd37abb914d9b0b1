"""The sums of a validation: nats, predicted tokens and bytes of their text, exact over all batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_train.data.bits_per_byte import bits_per_byte


@dataclass(frozen=True)
class ValidationResult:
    """What a validation has found. A loss is NaN where no token was predicted.

    Attributes:
        step: optimiser steps done before it.
        loss: nats per predicted token, over all sources.
        bits_per_byte: the same per byte of the predicted tokens' text.
        by_source: loss of each source by its name; empty for a single source.
    """

    step: int
    loss: float
    bits_per_byte: float
    by_source: Mapping[str, float]

    def loss_of(self, step: int) -> float | None:
        """The loss of the weights after a step; None where it is of other weights, or not finite."""
        return self.loss if self.step == step and math.isfinite(self.loss) else None


class ValidationSums:
    """Adds up the batches of this rank.

    Args:
        sources: names of the validated sources.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = sources
        self._parts: list[list[Tensor]] = [[] for _ in sources]

    def add(self, source: int, nats: Tensor, text: Tensor) -> None:
        """Adds a batch.

        Args:
            source: number of its source.
            nats: (), sum over its predicted tokens.
            text: (2,) float64, number of these tokens and bytes of their text.
        """
        self._parts[source].append(torch.cat([nats.to(text).view(1), text]))

    def result(self, reduce: Callable[[Tensor], Tensor], step: int) -> ValidationResult:
        """The result over all ranks; the sums begin anew.

        Args:
            reduce: sums a tensor over the ranks.
            step: optimiser steps done.
        """
        sums = torch.stack([torch.stack(parts).sum(0) for parts in self._parts])
        for parts in self._parts:
            parts.clear()
        rows = reduce(sums).tolist()  # (sources, 3)
        nats, tokens, text_bytes = (sum(column) for column in zip(*rows, strict=True))
        losses = {name: _mean(row[0], row[1]) for name, row in zip(self.sources, rows, strict=True)}
        bits = bits_per_byte(nats, text_bytes) if tokens else math.nan
        return ValidationResult(step, _mean(nats, tokens), bits, losses if len(losses) > 1 else {})


def _mean(nats: float, tokens: float) -> float:
    """nats / tokens as float32, in which trackers and other callbacks get it."""
    return float(torch.tensor(nats / tokens if tokens else math.nan))
