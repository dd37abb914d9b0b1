"""What a model's loss is to be measured against: n-grams and a compressor, on the same two texts.

Both see the training text only, and predict the held-out one. In nats a byte, as the loss of a byte-level model is.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]

LZMA_PRESET = 6  # the first preset whose window (8 MiB) holds most of a ten-megabyte text; 9 gains 0.1 % on the library
LONGEST = 2**24, 2**20  # bytes of the training and of the held-out text that are looked at, so that the time is bounded


def baselines(train: Bytes, held_out: Bytes) -> dict[str, float]:
    """Losses of byte 2-, 3- and 4-grams (contexts of 2, 3 and 4 bytes) and of lzma.

    Takes about ten seconds of one core for ten megabytes; most of it releases the interpreter lock, so a thread does.
    Of longer texts than LONGEST, the beginning is taken.

    Args:
        train: the bytes that the model is trained on, (N,).
        held_out: the bytes that it is validated on, (M,), M ≥ 1.

    Returns:
        Nats a byte by name: `2-gram`, `3-gram`, `4-gram`, `lzma`.
    """
    train, held_out, orders = train[: LONGEST[0]], held_out[: LONGEST[1]], (2, 3, 4)
    losses = {f"{order}-gram": loss for order, loss in zip(orders, ngram_losses(train, held_out, orders), strict=True)}
    losses["lzma"] = lzma_loss(train, held_out)
    return losses


def ngram_losses(train: Bytes, held_out: Bytes, orders: Sequence[int]) -> list[float]:
    """Losses of interpolated n-grams with contexts of `orders` bytes, at most 6.

    Witten-Bell: p(c | h) = (n(hc) + d(h) · p(c | h')) / (n(h) + d(h)), where n counts, d(h) is the number of different
    bytes seen after h, and h' is h without its first byte; below the empty context all bytes are equal.
    Both texts are read as one, so the first bytes of the held-out text have a context too.

    Returns:
        Nats a byte of the held-out text, one for each order.
    """
    text = np.concatenate((train, held_out))
    first, probability, losses = len(train), np.full(len(held_out), 1 / 256), {}
    grams = np.zeros(len(text), np.uint64)  # at i, the bytes i-order … i; those before the text count as 0
    for order in range(max(orders) + 1):
        grams[order:] |= text[: len(text) - order].astype(np.uint64) << np.uint64(8 * order)
        seen, counts = np.unique(grams[:first], return_counts=True)  # (context, byte) pairs of the training text
        contexts, starts = np.unique(seen >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, starts) if len(starts) else counts
        different = np.diff(np.append(starts, len(seen)))

        here = _look_up(seen, counts, grams[first:])
        context = grams[first:] >> np.uint64(8)
        total, kinds = _look_up(contexts, totals, context), _look_up(contexts, different, context)
        with np.errstate(invalid="ignore"):
            interpolated = (here + kinds * probability) / (total + kinds)
        probability = np.where(total > 0, interpolated, probability)
        losses[order] = float(-np.log(probability).mean())
    return [losses[order] for order in orders]


def _look_up(keys: Words, values: Counts, wanted: Words) -> Counts:
    """The value of each wanted key, 0 where it is not among the sorted keys."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def lzma_loss(train: Bytes, held_out: Bytes) -> float:
    """Nats that a held-out byte adds to the compressed training text."""
    alone = len(lzma.compress(train.tobytes(), preset=LZMA_PRESET))
    both = len(lzma.compress(train.tobytes() + held_out.tobytes(), preset=LZMA_PRESET))
    return (both - alone) * 8 * float(np.log(2)) / len(held_out)
