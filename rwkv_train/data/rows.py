"""How the samples of one source are filled into the rows of a batch: windows of its stream, or packed documents."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rwkv_train.data.order import Ints, StreamOrder, shuffled
from rwkv_train.data.packing import Packing
from rwkv_train.data.store import MemoryStore, Store

IGNORED = -100  # the target of what is no prediction: torch's own default


class Block(NamedTuple):
    """The arrays of a batch, to be filled."""

    tokens: Ints  # (B, T)
    targets: Ints  # (B, T)
    starts: npt.NDArray[np.bool_] | None  # (B, T), where a document begins that knows nothing of those before it

    @staticmethod
    def empty(rows: int, context: int, with_starts: bool) -> Block:
        starts = np.zeros((rows, context), bool) if with_starts else None
        return Block(np.empty((rows, context), np.int64), np.empty((rows, context), np.int64), starts)

    def row(self, number: int) -> Block:
        return Block(self.tokens[number], self.targets[number], None if self.starts is None else self.starts[number])


class Rows(Protocol):
    """The rows that a source can give."""

    @property
    def per_epoch(self) -> int:
        """Samples of one epoch."""

    def places(self, samples: Ints) -> Ints:
        """Where the samples with these numbers (≥ 0) lie, same shape; fill and predicted take it."""

    def fill(self, place: int, row: Block) -> None:
        """Fills one row, arrays of (T,)."""

    def predicted(self, places: Ints) -> Ints:
        """How many targets of each row are predictions, same shape."""


class Windows:
    """Contexts cut from the stream: tokens, and what follows each."""

    def __init__(self, store: Store, order: StreamOrder, context: int) -> None:
        self.store, self.order, self.context = store, order, context

    @property
    def per_epoch(self) -> int:
        return self.order.windows

    def places(self, samples: Ints) -> Ints:
        return self.order.starts(samples)

    def fill(self, place: int, row: Block) -> None:
        self.store.read(place, row.tokens)
        self.store.read(place + 1, row.targets)

    def predicted(self, places: Ints) -> Ints:
        return np.full(places.shape, self.context, np.int64)


class InOrder:
    """The stream's windows one after the other, each token predicted once but for the first; the last is filled up."""

    def __init__(self, store: Store, context: int, end_of_text: int) -> None:
        self.store, self.context, self.end_of_text = store, context, end_of_text

    @property
    def per_epoch(self) -> int:
        return -(-max(0, len(self.store) - 1) // self.context)

    def places(self, samples: Ints) -> Ints:
        return samples

    def fill(self, place: int, row: Block) -> None:
        begin, length = place * self.context, len(self.store)
        row.tokens[:], row.targets[:] = self.end_of_text, IGNORED
        tokens, targets = (max(0, min(self.context, length - begin - ahead)) for ahead in (0, 1))
        self.store.read(begin, row.tokens[:tokens])
        self.store.read(begin + 1, row.targets[:targets])

    def predicted(self, places: Ints) -> Ints:
        return np.clip(len(self.store) - 1 - places * self.context, 0, self.context)


class Packed:
    """Whole documents, several in a row; what is left of a row is not predicted.

    Without `reset` a document's first token is no prediction, unless the document is the first of its row: it would be
    guessed from the end of another text. With it, every document begins as a fresh text does.

    Args:
        store: that the packing was made for.
        packing: which pieces each row holds.
        seed: of the order of the rows, another in each epoch; None: as they are packed.
        end_of_text: what stands before a document.
        reset: whether rows say where documents begin.
    """

    def __init__(self, store: Store, packing: Packing, seed: int | None, end_of_text: int, reset: bool) -> None:
        self.store, self.packing, self.seed, self.end_of_text, self.reset = store, packing, seed, end_of_text, reset
        self.mask = store.predicted if isinstance(store, MemoryStore) else None
        self._counts = self._count()

    def _count(self) -> Ints:
        """(R + 1,) predictions in the rows before each."""
        pieces, mask = self.packing, self.mask
        counts, firsts = pieces.lengths, np.ones(len(pieces.lengths), np.int64)
        if mask is not None:
            sums = np.concatenate(([0], np.cumsum(mask)))
            counts = sums[pieces.begins + pieces.lengths] - sums[pieces.begins]
            firsts = mask[pieces.begins].astype(np.int64)
        if not self.reset:
            crossing = np.ones(len(pieces.lengths), bool)
            crossing[pieces.rows[:-1]] = False  # the first piece of a row
            counts = counts - firsts * crossing
        return np.concatenate(([0], np.cumsum(counts)))[pieces.rows]

    @property
    def per_epoch(self) -> int:
        return len(self.packing)

    def places(self, samples: Ints) -> Ints:
        return samples if self.seed is None else shuffled(samples, len(self.packing), self.seed)

    def fill(self, place: int, row: Block) -> None:
        row.tokens[:], row.targets[:] = self.end_of_text, IGNORED
        if place >= len(self.packing):
            return
        pieces, at = self.packing, 0
        for number in range(int(pieces.rows[place]), int(pieces.rows[place + 1])):
            begin, end = int(pieces.begins[number]), at + int(pieces.lengths[number])
            targets = row.targets[at:end]
            self.store.read(begin, targets)
            row.tokens[at + 1 : end] = targets[:-1]
            if not pieces.heads[number]:
                self.store.read(begin - 1, row.tokens[at : at + 1])
            if self.mask is not None:
                targets[~self.mask[begin : begin + len(targets)]] = IGNORED
            if at and not self.reset:
                targets[0] = IGNORED
            if row.starts is not None:
                row.starts[at] = True
            at = end

    def predicted(self, places: Ints) -> Ints:
        inside = np.minimum(places, len(self.packing) - 1)
        return np.where(places < len(self.packing), self._counts[inside + 1] - self._counts[inside], 0)
