"""Beginnings that several texts share are read once: a recurrent model's memory of them has constant size.

Texts with the same few-shot examples, or the choices of one question, differ at their ends only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rwkv_train.inference.continuation import read
from rwkv_train.models import LanguageModel, State

WORTH = 32  # tokens that must be saved for a beginning to be read by itself
_MOST = 2048  # texts that are looked at together: so many memories may be held at once


class Begun(NamedTuple):
    """A text of which the first tokens have been read."""

    number: int  # of the text
    read: int  # tokens
    state: State | None  # after them, of one row; None: none were read


def share(
    model: LanguageModel, texts: Sequence[Sequence[int]], limits: Sequence[int], batch: int
) -> Iterator[list[Begun]]:
    """Batches of texts to go on with, each with the memory of what it shares with others.

    Args:
        texts: tokens of each.
        limits: how many of them may be read beforehand (less than all).
        batch: texts of a batch; those of one have nearly as many tokens left.
    """
    ordered = sorted(range(len(texts)), key=lambda number: list(texts[number]))
    for first in range(0, len(ordered), _MOST):
        begun = _share(model, texts, limits, ordered[first : first + _MOST])
        begun.sort(key=lambda text: text.read - len(texts[text.number]))  # the longest first
        for place in range(0, len(begun), batch):
            yield begun[place : place + batch]


def _share(
    model: LanguageModel, texts: Sequence[Sequence[int]], limits: Sequence[int], ordered: Sequence[int]
) -> list[Begun]:
    """Walks down the tree of beginnings; its leaves are the texts."""
    leaves: list[Begun] = []
    waiting: list[tuple[Sequence[int], int, State | None]] = [(ordered, 0, None)]  # texts that agree so far
    while waiting:
        group, done, state = waiting.pop()
        if len(group) == 1:
            leaves.append(Begun(group[0], done, state))
            continue
        agreed = _agreement(texts[group[0]], texts[group[-1]])  # of the first and the last of a sorted group: of all
        common = min(agreed, *(limits[number] for number in group))
        if (common - done) * (len(group) - 1) >= WORTH:
            _, state = read(model, [(texts[group[0]][done:common], state)])
            done = common
        branch = min(agreed, *(len(texts[number]) for number in group))
        ends = [number for number in group if limits[number] <= branch]  # nothing more of them can be shared
        leaves += [Begun(number, done, state) for number in ends]
        rest: dict[int, list[int]] = {}
        for number in group:
            if limits[number] > branch:
                rest.setdefault(texts[number][branch], []).append(number)
        waiting += [(part, done, state) for part in rest.values()]
    return leaves


def _agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are the same."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)
