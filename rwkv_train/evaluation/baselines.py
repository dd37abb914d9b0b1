"""Baselines for the loss of a byte-level model: n-grams and a compressor.

They see the training text and predict the held-out text. All losses are in nats per byte, like the model's.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rwkv_train.data.arrays import Ints, UnsignedInts

Bytes = npt.NDArray[np.uint8]

LZMA_PRESET = 6  # the first preset whose window (8 MiB) holds most of a ten-megabyte text; 9 gains 0.1 % on the library
MAX_TRAIN_BYTES, MAX_HELD_OUT_BYTES = 2**24, 2**20  # that are used of each text, so that the time is bounded


def baselines(train: Bytes, held_out: Bytes) -> dict[str, float]:
    """Losses of byte 2-, 3- and 4-grams (contexts of 2, 3 and 4 bytes) and of lzma.

    Takes about ten seconds on one core for ten megabytes. Only the first MAX_TRAIN_BYTES and MAX_HELD_OUT_BYTES are
    used.

    Args:
        train: bytes that the model was trained on, (N,).
        held_out: bytes that it is validated on, (M,), M ≥ 1.

    Returns:
        Nats per byte by name: `2-gram`, `3-gram`, `4-gram`, `lzma`.
    """
    train, held_out, orders = train[:MAX_TRAIN_BYTES], held_out[:MAX_HELD_OUT_BYTES], (2, 3, 4)
    losses = {f"{order}-gram": loss for order, loss in zip(orders, ngram_losses(train, held_out, orders), strict=True)}
    losses["lzma"] = lzma_loss(train, held_out)
    return losses


def ngram_losses(train: Bytes, held_out: Bytes, orders: Sequence[int]) -> list[float]:
    """Losses of interpolated n-grams with contexts of `orders` bytes.

    Witten-Bell smoothing (Witten and Bell 1991): p(c | h) = (n(hc) + d(h) · p(c | h')) / (n(h) + d(h)), where n are
    counts in the training text, d(h) is the number of different bytes after h, and h' is h without its first byte;
    below the empty context all bytes are equally likely. The context of the held-out text's first bytes is the end of
    the training text.

    Args:
        train: training bytes, (N,).
        held_out: held-out bytes, (M,), M ≥ 1.
        orders: lengths of the contexts in bytes, at most 6 each.

    Returns:
        Nats per held-out byte, one for each order.
    """
    text = np.concatenate((train, held_out))
    first, probability, losses = len(train), np.full(len(held_out), 1 / 256), {}
    grams = np.zeros(len(text), np.uint64)  # at i: the bytes i-order … i, with 0 before the text
    for order in range(max(orders) + 1):
        grams[order:] |= text[: len(text) - order].astype(np.uint64) << np.uint64(8 * order)
        seen, counts = np.unique(grams[:first], return_counts=True)  # (context, byte) pairs of the training text
        contexts, starts = np.unique(seen >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, starts) if len(starts) else counts
        different = np.diff(np.append(starts, len(seen)))

        count = _look_up(seen, counts, grams[first:])
        context = grams[first:] >> np.uint64(8)
        total, kinds = _look_up(contexts, totals, context), _look_up(contexts, different, context)
        with np.errstate(invalid="ignore"):
            interpolated = (count + kinds * probability) / (total + kinds)
        probability = np.where(total > 0, interpolated, probability)
        losses[order] = float(-np.log(probability).mean())
    return [losses[order] for order in orders]


def _look_up(keys: UnsignedInts, values: Ints, queries: UnsignedInts) -> Ints:
    """The value of each query, 0 if it is not among the sorted keys."""
    if not len(keys):
        return np.zeros(len(queries), np.int64)
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, values[index], 0)


def lzma_loss(train: Bytes, held_out: Bytes) -> float:
    """Nats that each held-out byte adds to the compressed training text."""
    alone = len(lzma.compress(train.tobytes(), preset=LZMA_PRESET))
    both = len(lzma.compress(train.tobytes() + held_out.tobytes(), preset=LZMA_PRESET))
    return (both - alone) * 8 * float(np.log(2)) / len(held_out)
