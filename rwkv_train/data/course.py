"""Which samples of the data the steps of a run read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rwkv_train.data.arrays import Ints


@dataclass(frozen=True)
class Course:
    """Consecutive samples of the data, step by step, without the ranges that are passed over.

    Attributes:
        step: the first step that it is valid for.
        first: number of the first sample of that step, in the order of the data.
        each: samples of a step.
        skips: (first, end) of ranges of samples that are passed over, ascending and disjoint.
    """

    step: int
    first: int
    each: int
    skips: tuple[tuple[int, int], ...] = ()

    def samples(self, step: int, steps: int = 1) -> Ints:
        """The numbers of all samples of consecutive steps, (steps · each,)."""
        begin = self.first + (step - self.step) * self.each
        numbers = np.arange(begin, begin + steps * self.each, dtype=np.int64)
        for first, end in self._ahead():
            numbers = np.where(numbers >= first, numbers + (end - first), numbers)
        return numbers

    def number(self, step: int) -> int:
        """The number of the first sample of a step."""
        return int(self.samples(step)[0])

    def end(self, step: int) -> int:
        """The number after the last sample that the steps before this one read."""
        return self.first if step <= self.step else int(self.samples(step - 1)[-1]) + 1

    def ranges(self, step: int) -> Iterator[tuple[int, int]]:
        """The ranges (first, end) of samples that the steps before this one read, from the first step on."""
        position, left = self.first, (step - self.step) * self.each
        for first, end in self._ahead():
            read = min(left, first - position)
            if read:
                yield position, position + read
            left -= read
            if not left:
                return
            position = end
        if left:
            yield position, position + left

    def _ahead(self) -> Iterator[tuple[int, int]]:
        return ((max(first, self.first), end) for first, end in self.skips if end > self.first)
