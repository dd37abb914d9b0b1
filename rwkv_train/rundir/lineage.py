"""Which of a run's starts its records and checkpoints come from.

Each start of a run takes the next number, its attempt, and writes under names that carry it and nowhere else. An
old one may still be alive: stopped before a write, or left behind on a node that the cluster has given up. Nobody can
hinder it from writing, so what it writes is made not to count: each attempt notes, before its first row, which
checkpoint it goes on from. The chain of these notes, from the newest backwards, says whose steps are the run's. No
clock is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Start:
    """What an attempt notes when it begins.

    Args:
        number: its own, from 1 on; 0 stands for a run directory from before there were numbers.
        step: the step that it goes on behind; 0 for a new run.
        parent: whose checkpoint that is; None: nobody's of this run.
        seen: lines of each event file of the earlier ones, as they were then; what comes later does not count.
    """

    number: int
    step: int = 0
    parent: int | None = None
    seen: Mapping[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"attempt": self.number, "step": self.step, "parent": self.parent, "seen": dict(self.seen)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Start:
        return cls(found["attempt"], found["step"], found["parent"], found["seen"])


@dataclass(frozen=True)
class Span:
    """The steps (after, upto] of one attempt; upto None: all that it has written and will write."""

    number: int
    after: int
    upto: int | None

    def holds(self, step: int) -> bool:
        return self.after < step and (self.upto is None or step <= self.upto)


class Lineage:
    """The chain that leads to one attempt.

    Args:
        starts: of all attempts that have begun.
        head: where the chain ends; None: at the newest.
    """

    def __init__(self, starts: Iterable[Start], head: int | None = None) -> None:
        self._starts = {start.number: start for start in starts}
        self.spans = tuple(reversed(list(self._back(max(self._starts, default=None) if head is None else head))))

    def _back(self, number: int | None) -> Iterator[Span]:
        upto: int | None = None
        while number is not None and (start := self._starts.get(number)) is not None:
            yield Span(number, start.step or -1, upto)  # a new run may save before its first step
            upto = start.step
            number = start.parent if start.parent is None or start.parent < number else None

    def counts(self, number: int, step: int) -> bool:
        """Whether what that attempt wrote of that step is the run's; always, where nothing was noted."""
        return not self._starts or any(span.number == number and span.holds(step) for span in self.spans)

    def lines(self, file: str) -> int | None:
        """How many lines of an event file count; None: all, since nobody has begun after its attempt."""
        return min((start.seen[file] for start in self._starts.values() if file in start.seen), default=None)
