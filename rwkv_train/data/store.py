"""Where tokens lie, and how windows of them are read from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rwkv_train.data.tokenizers import Tokens

Ints = npt.NDArray[np.int64]


class Store(Protocol):
    """A stream of tokens of known length, made of documents."""

    def __len__(self) -> int:
        """The number of tokens."""

    def read(self, start: int, out: Ints) -> None:
        """Fills `out` (N,) with the tokens from `start` on."""

    def documents(self) -> tuple[Ints, Ints]:
        """The first token and the length of each document (D,); its end-of-text, if it has one, is its last token."""


class MemoryStore:
    """Tokens in memory, in the smallest type that holds them.

    Args:
        tokens: (N,), any integer type.
        starts: (D,) the first token of each document; a document reaches to the next one's. None: all are one.
        predicted: (N,) bool, which tokens are to be predicted; None: all.
    """

    def __init__(self, tokens: Tokens, starts: Ints | None = None, predicted: Tokens | None = None) -> None:
        self.tokens, self.predicted = tokens, predicted
        self._starts = np.zeros(min(1, len(tokens)), np.int64) if starts is None else starts

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, out: Ints) -> None:
        out[...] = self.tokens[start : start + len(out)]

    def documents(self) -> tuple[Ints, Ints]:
        return self._starts, np.diff(self._starts, append=len(self.tokens))


class Joined:
    """Several stores as one stream, one behind the other."""

    def __init__(self, parts: Sequence[Store]) -> None:
        self.parts = tuple(parts)
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, out: Ints) -> None:
        filled = 0
        while filled < len(out):
            number = int(np.searchsorted(self.ends, start + filled, side="right"))
            count = min(len(out) - filled, int(self.ends[number]) - start - filled)
            inside = start + filled - int(self.ends[number]) + len(self.parts[number])
            self.parts[number].read(inside, out[filled : filled + count])
            filled += count

    def documents(self) -> tuple[Ints, Ints]:
        found = [part.documents() for part in self.parts]
        begins = self.ends - [len(part) for part in self.parts]
        starts = [first + begin for (first, _), begin in zip(found, begins, strict=True)]
        return np.concatenate(starts), np.concatenate([lengths for _, lengths in found])


class Part:
    """The tokens of a store from `begin` to `end`, and the documents that begin there."""

    def __init__(self, whole: Store, begin: int, end: int) -> None:
        self.whole, self.begin, self.end = whole, begin, end

    def __len__(self) -> int:
        return self.end - self.begin

    def read(self, start: int, out: Ints) -> None:
        self.whole.read(self.begin + start, out)

    def documents(self) -> tuple[Ints, Ints]:
        starts, lengths = self.whole.documents()
        first, last = np.searchsorted(starts, (self.begin, self.end))
        return starts[first:last] - self.begin, lengths[first:last]
