"""Token stores in memory: a stream of tokens made of documents, joined streams, and slices of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rwkv_train.data.arrays import Ints
from rwkv_train.data.tokenizers import Tokens


class Store(Protocol):
    """A stream of tokens of known length, made of documents."""

    def __len__(self) -> int:
        """Number of tokens."""

    def read(self, start: int, out: Ints) -> None:
        """Copies the tokens start … start + N - 1 into `out`, int64 (N,)."""

    def documents(self) -> tuple[Ints, Ints]:
        """Offset and length in tokens of each document, (D,) each; a trailing end-of-text belongs to its document."""


class MemoryStore:
    """Tokens in memory.

    Args:
        tokens: (N,), any integer type.
        starts: offset of the first token of each document, (D,); a document ends where the next one starts. None: the
            stream is a single document.
        predicted: whether each token has a loss, bool (N,); None: all have.
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


class JoinedStore:
    """Several stores concatenated into one stream."""

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
        documents = [part.documents() for part in self.parts]
        begins = self.ends - [len(part) for part in self.parts]
        starts = [first + begin for (first, _), begin in zip(documents, begins, strict=True)]
        return np.concatenate(starts), np.concatenate([lengths for _, lengths in documents])


class StoreSlice:
    """The tokens begin … end - 1 of a store, and the documents that start among them.

    Args:
        store: the store.
        begin, end: range of tokens.
        cut: whether documents are cut at both ends: of a document that starts before `begin`, what follows the first
            token is one, and the last one ends at `end`. Else it is as long as in the store.
    """

    def __init__(self, store: Store, begin: int, end: int, cut: bool = False) -> None:
        self.store, self.begin, self.end, self.cut = store, begin, end, cut

    def __len__(self) -> int:
        return self.end - self.begin

    def read(self, start: int, out: Ints) -> None:
        self.store.read(self.begin + start, out)

    def documents(self) -> tuple[Ints, Ints]:
        starts, lengths = self.store.documents()
        first, last = np.searchsorted(starts, (self.begin, self.end))
        if not self.cut:
            return starts[first:last] - self.begin, lengths[first:last]
        inside = starts[first:last] - self.begin
        if self.begin and (not len(inside) or inside[0] > 1):
            inside = np.concatenate((np.ones(1, np.int64), inside))
        return inside, np.diff(inside, append=len(self))
