"""Converts between the two clocks of a run: optimiser steps, and tokens trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rwkv_train.config.settings import Duration


@dataclass(frozen=True)
class TokenClock:
    """How many tokens a run has trained on after each step, also where a resume has changed its batch.

    Attributes:
        batches: (step, tokens): from that step on, each step has so many tokens; the first pair is of step 0.
    """

    batches: tuple[tuple[int, int], ...]

    @classmethod
    def resumed(cls, batches: Iterable[tuple[int, int]], step: int, tokens_per_step: int) -> TokenClock:
        """The clock of a run that resumes after a step with a batch of so many tokens.

        Args:
            batches: of the run until then; none: it begins.
            step: the last one that is done.
            tokens_per_step: tokens of each further step.
        """
        kept = tuple(pair for pair in batches if pair[0] < step)
        return cls(kept if kept and kept[-1][1] == tokens_per_step else (*kept, (step, tokens_per_step)))

    @property
    def first_batch(self) -> int:
        """Tokens of the first step. Spans of the schedule that are given in steps are so many of these."""
        return self.batches[0][1]

    @property
    def batch(self) -> int:
        """Tokens of a step now."""
        return self.batches[-1][1]

    @property
    def changed(self) -> int:
        """The step from which on the batch is the present one."""
        return self.batches[-1][0]

    def tokens(self, step: int) -> int:
        """Tokens trained on when so many steps are done."""
        return sum(each * (min(step, end) - first) for first, end, each in self._spans(step) if first < step)

    def steps(self, length: Duration) -> int:
        """The number of steps after which a run of that length ends, in tokens rounded up."""
        if length.steps is not None:
            return length.steps
        assert length.tokens is not None
        left = length.tokens
        for (first, each), (end, _) in zip(self.batches, self.batches[1:], strict=False):
            if left <= (end - first) * each:
                return first - (-left // each)
            left -= (end - first) * each
        return self.changed - (-left // self.batch)

    def _spans(self, step: int) -> Iterator[tuple[int, int, int]]:
        ends = [first for first, _ in self.batches[1:]] + [max(step, self.changed)]
        return ((first, end, each) for (first, each), end in zip(self.batches, ends, strict=True))
