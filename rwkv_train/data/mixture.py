"""Several sources in one run: which source sample n comes from, and how many of that source were before.

Within a stage, a span of samples with fixed weights, the sources follow one another in a pattern that is repeated:
before every sample each source has had its weight's share of the samples, to within one sample. A stage ends where the
curriculum says, or where a source has been read as often as it may be. So everything is a function of n alone.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from rwkv_train.data.order import Ints
from rwkv_train.errors import UserError

LONGEST_PATTERN = 2**16  # weights that would need a longer one are rounded to multiples of 1/65536


@dataclass(frozen=True)
class Share:
    """One source of a mixture.

    Args:
        name: for people.
        weight: of its tokens in the mixture, relative to the others'.
        per_epoch: samples of one epoch.
        epochs: how often it may be read at most; None: without end.
    """

    name: str
    weight: float
    per_epoch: int
    epochs: float | None = None

    @property
    def limit(self) -> int | None:
        """Samples that may be taken of it."""
        return None if self.epochs is None else max(1, math.floor(self.epochs * self.per_epoch))


@dataclass(frozen=True)
class _Stage:
    first: int  # sample that it begins with
    before: Ints  # (S,) samples taken of each source before it
    shares: Ints  # (S,) samples of each source in one pattern
    pattern: Ints  # (P,) the source of each sample of a pattern
    places: Ints  # (P,) how many samples of the same source stand before it in the pattern

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        round_, place = np.divmod(samples - self.first, len(self.pattern))
        source = self.pattern[place]
        return source, self.before[source] + self.places[place] + np.asarray(round_ * self.shares[source], np.int64)

    def counts(self, samples: int) -> Ints:
        """(S,) samples of each source among the first `samples` of the run, which must reach into this stage."""
        round_, place = divmod(samples - self.first, len(self.pattern))
        return self.before + round_ * self.shares + np.bincount(self.pattern[:place], minlength=len(self.shares))

    def exhausted(self, source: int, limit: int) -> int | None:
        """The sample before which the source has been taken `limit` times; None: it is not in this stage."""
        if not self.shares[source]:
            return None
        round_, place = divmod(limit - 1 - int(self.before[source]), int(self.shares[source]))
        return self.first + round_ * len(self.pattern) + int(np.flatnonzero(self.pattern == source)[place]) + 1


class Mixture:
    """The order of sources.

    Args:
        shares: at least one.
        curriculum: (first sample, weights by name) of later stages, in their order; a source that is not named there
            has weight 0 from then on.

    Attributes:
        samples: how many there are until every source is used up; None: without end.

    Raises:
        UserError: a stage in which no source has a weight, or names an unknown one.
    """

    def __init__(self, shares: Sequence[Share], curriculum: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        self.shares = tuple(shares)
        self.samples: int | None = None
        self._stages: list[_Stage] = []
        self._plan([(0, {share.name: share.weight for share in shares}), *curriculum])
        self._firsts = np.array([stage.first for stage in self._stages])

    def _plan(self, spans: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        first, taken = 0, np.zeros(len(self.shares), np.int64)
        for number, (_, weights) in enumerate(spans):
            end = spans[number + 1][0] if number + 1 < len(spans) else None
            self._refuse(first, weights)
            while end is None or first < end:
                left = [
                    Fraction(str(weights.get(share.name, 0))) if share.limit is None or taken[i] < share.limit else 0
                    for i, share in enumerate(self.shares)
                ]
                if not any(left):
                    self.samples = first
                    return
                counts = settle(left)
                stage = _Stage(first, taken, counts, *interleave(counts))
                self._stages.append(stage)
                ends = [
                    stage.exhausted(i, share.limit)
                    for i, share in enumerate(self.shares)
                    if share.limit is not None and left[i]
                ]
                limits = [at for at in (*ends, end) if at is not None]
                if not limits:
                    return
                first = min(limits)
                taken = stage.counts(first)

    def _refuse(self, first: int, weights: Mapping[str, float]) -> None:
        names = [share.name for share in self.shares]
        for name in weights:
            if name not in names:
                raise UserError(f"data.curriculum names the source {name}", f"there is: {', '.join(names)}")
        if not any(weights.values()):
            raise UserError(f"no source has a weight from sample {first:,} on", "give at least one a weight above 0")

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """The sources of the samples with these numbers, and their numbers within the sources; same shape.

        Raises:
            UserError: the sources are used up before one of them.
        """
        if self.samples is not None and samples.size and int(samples.max()) >= self.samples:
            raise UserError(
                f"the sources are used up after {self.samples:,} samples",
                "a shorter budget, more epochs for a source (epochs: null is without end), or more data",
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
        """(S,) how many of the first `samples` samples come from each source."""
        return self._stages[int(np.searchsorted(self._firsts, samples, side="right")) - 1].counts(samples)

    def weights(self, sample: int = 0) -> dict[str, float]:
        """The share of each source from a sample on, as they are settled."""
        stage = self._stages[int(np.searchsorted(self._firsts, sample, side="right")) - 1]
        return {share.name: int(n) / len(stage.pattern) for share, n in zip(self.shares, stage.shares, strict=True)}


def settle(weights: Sequence[Fraction | int]) -> Ints:
    """Weights as whole numbers of samples in a pattern: exact where that is short enough, else rounded (none to 0)."""
    total = sum(weights)
    parts = [Fraction(weight) / total for weight in weights]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= LONGEST_PATTERN:
        return np.array([int(part * period) for part in parts], np.int64)
    whole = np.array([max(part > 0, int(part * LONGEST_PATTERN)) for part in parts], np.int64)
    order = np.argsort([float(int(n) - part * LONGEST_PATTERN) for n, part in zip(whole, parts, strict=True)])
    for i in range(LONGEST_PATTERN - int(whole.sum())):  # largest remainders first
        whole[order[i % len(order)]] += 1
    return whole


def interleave(shares: npt.ArrayLike) -> tuple[Ints, Ints]:
    """One pattern in which source s has shares[s] places, spread evenly.

    Before place g, source s has had g · shares[s] / P places, more or less by under 1. The j-th place of s may be given
    from ⌊j·P/shares[s]⌋ on and must be before ⌈(j+1)·P/shares[s]⌉; the earliest deadline goes first, which finds an
    order that keeps all of them if there is one (Jackson 1955), and there is (Tijdeman 1980, chairman assignment).

    Args:
        shares: (S,) whole numbers, P their sum.

    Returns:
        The source of each place (P,), and how many places of the same source are before it (P,).
    """
    counts = [int(n) for n in np.asarray(shares)]
    period = sum(counts)
    waiting = [(0, source, 0) for source, n in enumerate(counts) if n]  # (from when on, source, number)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, number)
    pattern, places = np.empty(period, np.int64), np.empty(period, np.int64)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source, number = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(number + 1) * period // counts[source]), source, number))
        _, source, number = heapq.heappop(ready)
        pattern[place], places[place] = source, number
        if number + 1 < counts[source]:
            heapq.heappush(waiting, ((number + 1) * period // counts[source], source, number + 1))
    return pattern, places
