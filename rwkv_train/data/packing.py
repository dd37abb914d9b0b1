"""Whole documents packed into rows: each row holds as many as fit, and what fits into a row is not cut.

A document of n tokens takes n places of a row: at each, one of its tokens is predicted from the one before it, the
first from an end-of-text. What is longer than a row is cut into pieces of a row's length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rwkv_train.data.order import Ints

BLOCK = 2**16  # documents that are packed together: near ones, so that a row's are read from near places


@dataclass(frozen=True)
class Packing:
    """Which pieces each row holds.

    Attributes:
        rows: (R + 1,) row r holds the pieces rows[r] … rows[r + 1] - 1.
        begins: (P,) where each piece begins, in tokens of the stream.
        lengths: (P,) its tokens, at least 1.
        heads: (P,) bool, whether it is the beginning of a document.
        fill: share of all places that hold a token.
    """

    rows: Ints
    begins: Ints
    lengths: Ints
    heads: npt.NDArray[np.bool_]
    fill: float

    def __len__(self) -> int:
        return len(self.rows) - 1


def pack(starts: Ints, lengths: Ints, context: int) -> Packing:
    """Packs documents into rows of `context` places.

    Best-fit decreasing, a block of documents at a time: the longest piece first, into the fullest row that has room.

    Args:
        starts: (D,) the first token of each document.
        lengths: (D,) its tokens; empty documents are left out.
        context: places of a row.
    """
    begins, sizes, heads = _pieces(starts, lengths, context)
    order, row_sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for first in range(0, len(sizes), BLOCK):
        placed, counts = _pack_block(sizes[first : first + BLOCK], context)
        order.append(placed + first)
        row_sizes.append(counts)
    chosen, counts = np.concatenate(order), np.concatenate(row_sizes)
    rows = np.concatenate(([0], np.cumsum(counts)))
    fill = float(sizes.sum() / max(1, len(counts) * context))
    return Packing(rows, begins[chosen], sizes[chosen], heads[chosen], fill)


def _pieces(starts: Ints, lengths: Ints, context: int) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """Documents → pieces of at most `context` tokens: where each begins, its tokens, whether it begins a document."""
    counts = -(-lengths // context)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.minimum(context, lengths[document] - number * context)
    return starts[document] + number * context, sizes, number == 0


def _pack_block(sizes: Ints, context: int) -> tuple[Ints, Ints]:
    """Pieces in the order of the rows, and how many pieces each row has."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(context + 1)]  # the rows with so many places left
    rooms = 0  # bit n: some row has n places left; its lowest set bit from a size on is the tightest fit
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
