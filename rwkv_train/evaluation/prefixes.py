"""Prefixes that several texts share are read once, and the state after them is reused.

Texts with the same few-shot examples, or the choices of one question, differ at their ends only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rwkv_train.inference.continuation import read
from rwkv_train.models import LanguageModel, State

MIN_TOKENS_SAVED = 32  # a prefix is read by itself if that saves at least so many tokens
MAX_STATE_BYTES = 2**31  # bytes of all states that are held at a time at most


class Begun(NamedTuple):
    """A text of which the first tokens have been read."""

    number: int  # of the text
    read: int  # tokens
    state: State | None  # after them, of one row; None: none were read


def share(
    model: LanguageModel, texts: Sequence[Sequence[int]], limits: Sequence[int], batch: int
) -> Iterator[list[Begun]]:
    """Yields batches of texts, each with the state after the prefix that it shares with others.

    As many texts are examined together as MAX_STATE_BYTES allows states; further ones share nothing with them.

    Args:
        model: reads the prefixes.
        texts: tokens of each text.
        limits: for each text, how many of its tokens may be read as a prefix (less than all).
        batch: number of texts of a batch; the texts of one batch have nearly as many tokens left.
    """
    ordered = sorted(range(len(texts)), key=lambda number: list(texts[number]))
    at_once = max(2, MAX_STATE_BYTES // max(1, model.empty_state(1).row_bytes()))
    for first in range(0, len(ordered), at_once):
        begun = _share(model, texts, limits, ordered[first : first + at_once])
        begun.sort(key=lambda text: text.read - len(texts[text.number]))  # the longest first
        for start in range(0, len(begun), batch):
            yield begun[start : start + batch]


def _share(
    model: LanguageModel, texts: Sequence[Sequence[int]], limits: Sequence[int], ordered: Sequence[int]
) -> list[Begun]:
    """Walks down the tree of prefixes; its leaves are the texts."""
    leaves: list[Begun] = []
    waiting: list[tuple[Sequence[int], int, State | None]] = [(ordered, 0, None)]  # texts that agree so far
    while waiting:
        group, done, state = waiting.pop()
        if len(group) == 1:
            leaves.append(Begun(group[0], done, state))
            continue
        agreed = _agreement(texts[group[0]], texts[group[-1]])  # of the first and the last of a sorted group: of all
        common = min(agreed, *(limits[number] for number in group))
        if (common - done) * (len(group) - 1) >= MIN_TOKENS_SAVED:
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
    """Length of the common prefix."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
