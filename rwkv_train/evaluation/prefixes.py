"""Prefixes that several texts share are read once: a recurrent model's state after a prefix has constant size.

Texts with the same few-shot examples, and the choices of one question, differ only at their ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rwkv_train.inference.continuation import read
from rwkv_train.models import LanguageModel, State

MIN_TOKENS_SAVED = 32  # by reading a prefix on its own
MAX_STATE_BYTES = 2**31  # of all states that are held at a time at most


class PrefixedText(NamedTuple):
    """A text whose first tokens have been read.

    Attributes:
        number: index of the text.
        read: number of tokens read.
        state: state after them, with batch size 1; None: nothing was read.
    """

    number: int
    read: int
    state: State | None


def share_prefixes(
    model: LanguageModel, texts: Sequence[Sequence[int]], limits: Sequence[int], batch: int
) -> Iterator[list[PrefixedText]]:
    """Yields batches of texts to continue, each with the state after the prefix that it shares with others.

    Args:
        model: reads the prefixes.
        texts: tokens of each text.
        limits: maximum number of tokens of each text that may be read as a prefix, less than all of them.
        batch: texts per batch; those of a batch have similar numbers of tokens left.
    """
    ordered = sorted(range(len(texts)), key=lambda number: list(texts[number]))
    at_once = max(2, MAX_STATE_BYTES // max(1, model.empty_state(1).row_bytes()))
    for first in range(0, len(ordered), at_once):
        prefixed = _read_prefixes(model, texts, limits, ordered[first : first + at_once])
        prefixed.sort(key=lambda text: text.read - len(texts[text.number]))  # longest rest first
        for start in range(0, len(prefixed), batch):
            yield prefixed[start : start + batch]


def _read_prefixes(
    model: LanguageModel, texts: Sequence[Sequence[int]], limits: Sequence[int], ordered: Sequence[int]
) -> list[PrefixedText]:
    """Walks down the prefix tree of the sorted texts `ordered`; its leaves are the texts."""
    leaves: list[PrefixedText] = []
    waiting: list[tuple[Sequence[int], int, State | None]] = [(ordered, 0, None)]  # texts with a common prefix
    while waiting:
        group, done, state = waiting.pop()
        if len(group) == 1:
            leaves.append(PrefixedText(group[0], done, state))
            continue
        agreed = _common_prefix(texts[group[0]], texts[group[-1]])  # of a sorted group's first and last text, so of all
        common = min(agreed, *(limits[number] for number in group))
        if (common - done) * (len(group) - 1) >= MIN_TOKENS_SAVED:
            _, state = read(model, [(texts[group[0]][done:common], state)])
            done = common
        branch = min(agreed, *(len(texts[number]) for number in group))
        ends = [number for number in group if limits[number] <= branch]  # their rest cannot be shared
        leaves += [PrefixedText(number, done, state) for number in ends]
        rest: dict[int, list[int]] = {}
        for number in group:
            if limits[number] > branch:
                rest.setdefault(texts[number][branch], []).append(number)
        waiting += [(part, done, state) for part in rest.values()]
    return leaves


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two texts."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)
