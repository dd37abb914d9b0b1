"""Packs documents into rows: several to a row, and none is cut that fits into a row.

A document of n tokens takes n positions of a row: each of its tokens is predicted there from the one before it, the
first one from an end-of-text. A document longer than a row is cut into pieces of a row's length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rwkv_train.data.arrays import Bools, Ints

DOCUMENTS_PER_BLOCK = 2**16  # packed together: the documents of a row are near each other on disk


@dataclass(frozen=True)
class Packing:
    """The pieces of each row.

    Attributes:
        rows: row r has the pieces rows[r] … rows[r + 1] - 1, (R + 1,).
        begins: offset of each piece in the token stream, (P,).
        lengths: number of tokens of each piece, at least 1, (P,).
        heads: whether each piece is the beginning of a document, bool (P,).
        fill: share of all positions that have a token, 0 to 1.
    """

    rows: Ints
    begins: Ints
    lengths: Ints
    heads: Bools
    fill: float

    def __len__(self) -> int:
        return len(self.rows) - 1


def pack(starts: Ints, lengths: Ints, context: int) -> Packing:
    """Packs documents into rows of `context` positions.

    Best-fit decreasing within each block of documents: the longest piece first, into the fullest row that has room.

    Args:
        starts: offset of the first token of each document, (D,).
        lengths: number of tokens of each document, (D,); empty documents are left out.
        context: positions of a row.
    """
    begins, sizes, heads = _pieces(starts, lengths, context)
    order, row_sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for first in range(0, len(sizes), DOCUMENTS_PER_BLOCK):
        packed, counts = _pack_block(sizes[first : first + DOCUMENTS_PER_BLOCK], context)
        order.append(packed + first)
        row_sizes.append(counts)
    chosen, counts = np.concatenate(order), np.concatenate(row_sizes)
    rows = np.concatenate(([0], np.cumsum(counts)))
    fill = float(sizes.sum() / max(1, len(counts) * context))
    return Packing(rows, begins[chosen], sizes[chosen], heads[chosen], fill)


def _pieces(starts: Ints, lengths: Ints, context: int) -> tuple[Ints, Ints, Bools]:
    """Cuts documents into pieces of at most `context` tokens: offsets, lengths, and whether each begins a document."""
    counts = -(-lengths // context)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.minimum(context, lengths[document] - number * context)
    return starts[document] + number * context, sizes, number == 0


def _pack_block(sizes: Ints, context: int) -> tuple[Ints, Ints]:
    """Packs one block: pieces in the order of the rows, and the number of pieces of each row."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(context + 1)]  # rows by free positions
    rooms = 0  # bit n: some row has n free positions; the lowest set bit from bit `size` on is the tightest fit
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = context, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = room - size
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return np.array([piece for row in rows for piece in row], np.int64), np.array([len(row) for row in rows], np.int64)
