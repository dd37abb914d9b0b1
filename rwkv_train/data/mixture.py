"""Mixtures of sources: which source sample n comes from, and its number within that source.

A stage is a range of samples with fixed weights. Within it the sources follow a repeated pattern: at every sample, each
source has had its share of the samples, to within one sample. A stage ends as the curriculum defines, or where a source
has been read for its last epoch. Everything is a function of n alone.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from rwkv_train.data.arrays import Ints
from rwkv_train.errors import UserError

MAX_PATTERN_SAMPLES = 2**16  # weights that need a longer pattern are rounded to multiples of 1/65536


@dataclass(frozen=True)
class SourceShare:
    """The part of one source in a mixture.

    Attributes:
        name: name of the source.
        weight: its share of the samples, relative to the other sources' weights.
        per_epoch: number of samples of one epoch.
        epochs: maximum number of epochs, not necessarily an integer; None: unlimited.
    """

    name: str
    weight: float
    per_epoch: int
    epochs: float | None = None

    @property
    def limit(self) -> int | None:
        """Maximum number of samples that are read from the source; None: unlimited."""
        return None if self.epochs is None else max(1, math.floor(self.epochs * self.per_epoch))


@dataclass(frozen=True)
class _Stage:
    """A range of samples with fixed weights.

    Attributes:
        first: number of its first sample.
        before: samples taken from each source before the stage, (S,).
        shares: samples of each source in one pattern, (S,).
        pattern: source of each sample of the pattern, (P,).
        ranks_in_source: number of earlier samples of the same source in the pattern, (P,).
    """

    first: int
    before: Ints
    shares: Ints
    pattern: Ints
    ranks_in_source: Ints

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        repetition, index = np.divmod(samples - self.first, len(self.pattern))
        source = self.pattern[index]
        in_earlier_patterns = np.asarray(repetition * self.shares[source], np.int64)
        return source, self.before[source] + in_earlier_patterns + self.ranks_in_source[index]

    def counts(self, samples: int) -> Ints:
        """Samples of each source among the first `samples` of the run, (S,); `samples` must be in this stage."""
        repetitions, rest = divmod(samples - self.first, len(self.pattern))
        return self.before + repetitions * self.shares + np.bincount(self.pattern[:rest], minlength=len(self.shares))

    def exhausted(self, source: int, limit: int) -> int | None:
        """Number of the sample before which the source has provided `limit` samples; None: it has no weight here."""
        if not self.shares[source]:
            return None
        repetitions, rest = divmod(limit - 1 - int(self.before[source]), int(self.shares[source]))
        return self.first + repetitions * len(self.pattern) + int(np.flatnonzero(self.pattern == source)[rest]) + 1


class Mixture:
    """The order in which samples are taken from several sources.

    Args:
        shares: the sources, at least one.
        curriculum: first sample and weights by name of each later stage, in order; a source without a weight there has
            weight 0 from then on.

    Attributes:
        samples: number of samples until the last epoch of every source has ended; None: unlimited.

    Raises:
        UserError: a stage has no source with a weight above 0, or names an unknown source.
    """

    def __init__(
        self, shares: Sequence[SourceShare], curriculum: Sequence[tuple[int, Mapping[str, float]]] = ()
    ) -> None:
        self.shares = tuple(shares)
        self.samples: int | None = None
        self._stages: list[_Stage] = []
        self._plan([(0, {share.name: share.weight for share in shares}), *curriculum])
        self._firsts = np.array([stage.first for stage in self._stages])

    def _plan(self, spans: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        first, taken = 0, np.zeros(len(self.shares), np.int64)
        for number, (_, weights) in enumerate(spans):
            end = spans[number + 1][0] if number + 1 < len(spans) else None
            self._check_weights(first, weights)
            while end is None or first < end:
                remaining = [
                    Fraction(str(weights.get(share.name, 0))) if share.limit is None or taken[i] < share.limit else 0
                    for i, share in enumerate(self.shares)
                ]
                if not any(remaining):
                    self.samples = first
                    return
                counts = pattern_shares(remaining)
                stage = _Stage(first, taken, counts, *interleave(counts))
                self._stages.append(stage)
                ends = [
                    stage.exhausted(i, share.limit)
                    for i, share in enumerate(self.shares)
                    if share.limit is not None and remaining[i]
                ]
                limits = [at for at in (*ends, end) if at is not None]
                if not limits:
                    return
                first = min(limits)
                taken = stage.counts(first)

    def _check_weights(self, first: int, weights: Mapping[str, float]) -> None:
        names = [share.name for share in self.shares]
        for name in weights:
            if name not in names:
                raise UserError(
                    f"data.curriculum names the unknown source {name}", f"known sources: {', '.join(names)}"
                )
        if not any(weights.values()):
            raise UserError(
                f"no source has a weight above 0 from sample {first:,} on", "give at least one source a weight above 0"
            )

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """The source of each sample, and its number within that source.

        Args:
            samples: numbers of samples of the run, ≥ 0.

        Returns:
            Two arrays of the same shape.

        Raises:
            UserError: the last epoch of every source ends before one of the samples.
        """
        if self.samples is not None and samples.size and int(samples.max()) >= self.samples:
            raise UserError(
                f"the last epoch of every source ends after {self.samples:,} samples",
                "lower the budget, allow a source more epochs (epochs: null is unlimited), or add data",
            )
        stages = np.searchsorted(self._firsts, samples, side="right") - 1
        if samples.size and stages.min() == stages.max():
            return self._stages[int(stages.flat[0])].locate(samples)
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        for stage in np.unique(stages):
            here = stages == stage
            sources[here], numbers[here] = self._stages[stage].locate(samples[here])
        return sources, numbers

    def counts(self, samples: int) -> Ints:
        """How many of the first `samples` samples come from each source, (S,)."""
        return self._stages[int(np.searchsorted(self._firsts, samples, side="right")) - 1].counts(samples)

    def weights(self, sample: int = 0) -> dict[str, float]:
        """The share of each source in the stage of a sample, by name, as rounded by `pattern_shares`."""
        stage = self._stages[int(np.searchsorted(self._firsts, sample, side="right")) - 1]
        return {share.name: int(n) / len(stage.pattern) for share, n in zip(self.shares, stage.shares, strict=True)}


def pattern_shares(weights: Sequence[Fraction | int]) -> Ints:
    """The number of samples of each source in a pattern, (S,).

    Exact if the pattern has at most MAX_PATTERN_SAMPLES samples, otherwise rounded; no weight above 0 becomes 0.
    """
    total = sum(weights)
    parts = [Fraction(weight) / total for weight in weights]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= MAX_PATTERN_SAMPLES:
        return np.array([int(part * period) for part in parts], np.int64)
    rounded = np.array([max(part > 0, int(part * MAX_PATTERN_SAMPLES)) for part in parts], np.int64)
    order = np.argsort([float(int(n) - part * MAX_PATTERN_SAMPLES) for n, part in zip(rounded, parts, strict=True)])
    for i in range(MAX_PATTERN_SAMPLES - int(rounded.sum())):  # largest remainders first
        rounded[order[i % len(order)]] += 1
    return rounded


def interleave(shares: npt.ArrayLike) -> tuple[Ints, Ints]:
    """A pattern of P samples in which source s has shares[s] samples, spread evenly.

    Among the first g samples, source s has g · shares[s] / P, with an error below 1. Sample j of source s is released
    at ⌊j·P/shares[s]⌋ and due before ⌈(j+1)·P/shares[s]⌉. Earliest deadline first finds an order that meets all
    deadlines if one exists (Jackson 1955), and one does (Tijdeman 1980, chairman assignment problem).

    Args:
        shares: samples of each source, integers (S,) with sum P.

    Returns:
        The source of each sample (P,), and the number of earlier samples of the same source (P,).
    """
    counts = [int(n) for n in np.asarray(shares)]
    period = sum(counts)
    waiting = [(0, source, 0) for source, n in enumerate(counts) if n]  # (release, source, number)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, number)
    pattern, ranks_in_source = np.empty(period, np.int64), np.empty(period, np.int64)
    for index in range(period):
        while waiting and waiting[0][0] <= index:
            _, source, number = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(number + 1) * period // counts[source]), source, number))
        _, source, number = heapq.heappop(ready)
        pattern[index], ranks_in_source[index] = source, number
        if number + 1 < counts[source]:
            heapq.heappush(waiting, ((number + 1) * period // counts[source], source, number + 1))
    return pattern, ranks_in_source
