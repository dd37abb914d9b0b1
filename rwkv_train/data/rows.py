"""The rows of a batch filled from one source: windows of its token stream, or packed documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from rwkv_train.data.arrays import Bools, Ints
from rwkv_train.data.order import StreamOrder, shuffled
from rwkv_train.data.packing import Packing, pack
from rwkv_train.data.store import MemoryStore, Store

IGNORED_TARGET = -100  # target without a loss: the default ignore_index of torch's cross entropy


class BatchArrays(NamedTuple):
    """The arrays of a batch, or of one of its rows.

    Attributes:
        tokens: the model's input, int64 (B, T).
        targets: the next token of each, IGNORED_TARGET where there is no loss, int64 (B, T).
        starts: whether a document starts here that must not see the tokens before it, bool (B, T); None if documents
            share their state.
    """

    tokens: Ints
    targets: Ints
    starts: Bools | None

    @staticmethod
    def empty(rows: int, context: int, with_starts: bool) -> BatchArrays:
        """Arrays of (rows, context) whose tokens and targets are not initialised; no document starts."""
        starts = np.zeros((rows, context), bool) if with_starts else None
        return BatchArrays(np.empty((rows, context), np.int64), np.empty((rows, context), np.int64), starts)

    def row(self, number: int) -> BatchArrays:
        """Views of one row, (T,)."""
        starts = None if self.starts is None else self.starts[number]
        return BatchArrays(self.tokens[number], self.targets[number], starts)


class Rows(Protocol):
    """The rows that a source provides, each addressed by an offset: of a window, or in the list of packed rows."""

    @property
    def per_epoch(self) -> int:
        """Number of samples of one epoch."""

    def offsets(self, samples: Ints) -> Ints:
        """The offset of each sample, same shape.

        Args:
            samples: numbers of the source's samples, ≥ 0, counted through all epochs.
        """

    def fill(self, offset: int, row: BatchArrays) -> None:
        """Writes the row at an offset into arrays of (T,)."""

    def count_predictions(self, offsets: Ints) -> Ints:
        """Number of targets with a loss in each row, same shape."""


def read_rows(rows: Sequence[Rows], sources: Ints, offsets: Ints, context: int, with_starts: bool) -> BatchArrays:
    """Reads rows into new arrays.

    Args:
        rows: of each source.
        sources: (B,), which source each row is from.
        offsets: (B,), of each row in its source.
        context: T, tokens of a row.
        with_starts: whether documents do not share their state.
    """
    block = BatchArrays.empty(len(offsets), context, with_starts)
    for number, (source, offset) in enumerate(zip(sources.tolist(), offsets.tolist(), strict=True)):
        rows[source].fill(offset, block.row(number))
    return block


class Windows:
    """Windows of the token stream in the order of training: tokens, and the next token of each.

    Offsets are token positions in the stream.
    """

    def __init__(self, store: Store, order: StreamOrder, context: int) -> None:
        self.store, self.order, self.context = store, order, context

    @property
    def per_epoch(self) -> int:
        return self.order.windows

    def offsets(self, samples: Ints) -> Ints:
        return self.order.starts(samples)

    def fill(self, offset: int, row: BatchArrays) -> None:
        self.store.read(offset, row.tokens)
        self.store.read(offset + 1, row.targets)

    def count_predictions(self, offsets: Ints) -> Ints:
        return np.full(offsets.shape, self.context, np.int64)


class SequentialWindows:
    """Windows of the token stream from its start to its end; each token but the first is predicted once.

    Offsets are window numbers. The last window is padded with end-of-text tokens without a loss, and so are windows
    beyond the end.
    """

    def __init__(self, store: Store, context: int, end_of_text: int) -> None:
        self.store, self.context, self.end_of_text = store, context, end_of_text

    @property
    def per_epoch(self) -> int:
        return -(-max(0, len(self.store) - 1) // self.context)

    def offsets(self, samples: Ints) -> Ints:
        return samples

    def fill(self, offset: int, row: BatchArrays) -> None:
        begin, length = offset * self.context, len(self.store)
        row.tokens[:], row.targets[:] = self.end_of_text, IGNORED_TARGET
        tokens, targets = (max(0, min(self.context, length - begin - shift)) for shift in (0, 1))
        self.store.read(begin, row.tokens[:tokens])
        self.store.read(begin + 1, row.targets[:targets])

    def count_predictions(self, offsets: Ints) -> Ints:
        return np.clip(len(self.store) - 1 - offsets * self.context, 0, self.context)


class PackedRows:
    """Complete documents, several in a row; the rest of a row is padding without a loss.

    Offsets are numbers of packed rows.

    With `reset` every document is read as if it were alone. Without it the state continues from one document into the
    next, and the first token of a document has no loss unless the document is the first of its row: it would be
    predicted from the end of an unrelated text.

    Args:
        store: the token stream that the packing was made for.
        packing: which pieces each row holds.
        seed: of the order of the rows, which differs between epochs; None: the order in which they were packed.
        end_of_text: the input token before the first token of a document.
        reset: whether `BatchArrays.starts` is filled.
    """

    def __init__(self, store: Store, packing: Packing, seed: int | None, end_of_text: int, reset: bool) -> None:
        self.store, self.packing, self.seed, self.end_of_text, self.reset = store, packing, seed, end_of_text, reset
        self.mask = store.predicted if isinstance(store, MemoryStore) else None
        self._predictions_before = self._accumulate_predictions()

    @classmethod
    def of(cls, store: Store, context: int, seed: int | None, end_of_text: int, reset: bool) -> PackedRows:
        """The documents of a store, packed into rows of `context` tokens."""
        starts, lengths = store.documents()
        return cls(store, pack(starts, lengths, context), seed, end_of_text, reset)

    def _accumulate_predictions(self) -> Ints:
        """Number of predictions in the rows before each row, (R + 1,)."""
        pieces, mask = self.packing, self.mask
        counts, firsts = pieces.lengths, np.ones(len(pieces.lengths), np.int64)
        if mask is not None:
            sums = np.concatenate(([0], np.cumsum(mask)))
            counts = sums[pieces.begins + pieces.lengths] - sums[pieces.begins]
            firsts = mask[pieces.begins].astype(np.int64)
        if not self.reset:
            has_predecessor = np.ones(len(pieces.lengths), bool)
            has_predecessor[pieces.rows[:-1]] = False  # the first piece of a row
            counts = counts - firsts * has_predecessor
        return np.concatenate(([0], np.cumsum(counts)))[pieces.rows]

    @property
    def per_epoch(self) -> int:
        return len(self.packing)

    def offsets(self, samples: Ints) -> Ints:
        return samples if self.seed is None else shuffled(samples, len(self.packing), self.seed)

    def fill(self, offset: int, row: BatchArrays) -> None:
        row.tokens[:], row.targets[:] = self.end_of_text, IGNORED_TARGET
        if offset >= len(self.packing):
            return
        pieces, column = self.packing, 0
        for number in range(int(pieces.rows[offset]), int(pieces.rows[offset + 1])):
            begin, end = int(pieces.begins[number]), column + int(pieces.lengths[number])
            targets = row.targets[column:end]
            self.store.read(begin, targets)
            row.tokens[column + 1 : end] = targets[:-1]
            if not pieces.heads[number]:  # the piece continues a document: its own previous token is the first input
                self.store.read(begin - 1, row.tokens[column : column + 1])
            if self.mask is not None:
                targets[~self.mask[begin : begin + len(targets)]] = IGNORED_TARGET
            if column and not self.reset:
                targets[0] = IGNORED_TARGET
            if row.starts is not None:
                row.starts[column] = True
            column = end

    def count_predictions(self, offsets: Ints) -> Ints:
        inside = np.minimum(offsets, len(self.packing) - 1)
        counts = self._predictions_before[inside + 1] - self._predictions_before[inside]
        return np.where(offsets < len(self.packing), counts, 0)
