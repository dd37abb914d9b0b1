"""Which samples step s has: a pure function of (seed, step), whatever the number of ranks.

The stream of tokens is cut into windows of one context each. One epoch visits every window exactly once, in an order
of its own, and the cuts of each epoch start at an offset of its own, so that no two epochs see the same windows. The
order is a keyed bijection, evaluated where it is asked for: nothing is stored, resuming needs only the step.
ReferenceOrder is that of RWKV-LM, for curves that are to be compared with published ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rwkv_train.config.mesh import Mesh
from rwkv_train.errors import UserError

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ROUNDS = 6  # four make a Feistel network pseudo-random (Luby and Rackoff 1988), two more for a modest round function


class StreamOrder(Protocol):
    """Which windows of a stream of tokens are read, and when."""

    @property
    def windows(self) -> int:
        """Windows of one epoch."""

    def starts(self, samples: Ints) -> Ints:
        """Where in the stream the samples with these numbers (≥ 0) start, same shape."""


@dataclass(frozen=True)
class Order:
    """The order of a stream of tokens.

    Args:
        seed: any integer.
        tokens: length of the stream.
        context: tokens of one window; its targets reach one token further.

    Raises:
        UserError: the stream is shorter than one window and its last target.
    """

    seed: int
    tokens: int
    context: int

    def __post_init__(self) -> None:
        _refuse_short(self.tokens, self.context)

    @property
    def windows(self) -> int:
        """Windows of one epoch: as many as fit behind every offset below one context, and at least one."""
        return max(1, self.tokens // self.context - 1)

    def starts(self, samples: Ints) -> Ints:
        """Where in the stream the samples with these numbers start.

        Args:
            samples: numbers in the endless order of samples, ≥ 0: step · samples of one global batch + place in it.

        Returns:
            The first token of each, same shape; its targets end at start + context, inclusive.
        """
        epoch, place = np.divmod(samples, self.windows)
        key = _key(self.seed, epoch)
        room = self.tokens - self.windows * self.context  # offsets that leave the last target: one to two contexts
        offset = (_mix(key) % np.uint64(room)).astype(np.int64)
        return offset + permute(place, self.windows, key) * self.context


@dataclass(frozen=True)
class ReferenceOrder:
    """RWKV-LM's walk (dataset.py of its v4neo to v7 trainers), without the prime having to be looked up.

    Sample n starts at context · (⌊p·(√5-1)/2⌋ · i³ mod p), where i = n + 1 and p is the largest prime below
    tokens/context - 1 that is 2 modulo 3: for such p, and no other, cubing is a bijection modulo p.
    Every epoch of p samples has the same order, and a seed plays no part.

    Args:
        tokens: length of the stream.
        context: tokens of one window.

    Raises:
        UserError: the stream is too short for such a prime.
    """

    tokens: int
    context: int

    def __post_init__(self) -> None:
        _refuse_short(self.tokens, self.context)
        if self.tokens // self.context < 4:  # the smallest prime is 2, and the walk must leave a window behind it
            raise UserError(
                f"data.order=reference needs four windows of batch.context={self.context}: {4 * self.context:,} "
                f"tokens, not {self.tokens:,}",
                "give more text, a shorter batch.context=…, or data.order=shuffled",
            )

    @cached_property
    def windows(self) -> int:
        """The prime."""
        from sympy import isprime

        return next(p for p in range(self.tokens // self.context - 2, 1, -1) if p % 3 == 2 and isprime(p))

    def starts(self, samples: Ints) -> Ints:
        """Where in the stream the samples with these numbers start, same shape."""
        prime = self.windows
        factor = int(prime * (math.sqrt(5) - 1) / 2)
        walk = [factor * pow(int(n) + 1, 3, prime) % prime * self.context for n in samples.ravel()]
        return np.array(walk, np.int64).reshape(samples.shape)


def _refuse_short(tokens: int, context: int) -> None:
    if tokens <= context:
        raise UserError(
            f"the training data has {tokens:,} tokens; one sample of batch.context={context} needs {context + 1:,}",
            "give more text (data.path=…) or a shorter batch.context=…",
        )


def shuffled(samples: Ints, size: int, seed: int) -> Ints:
    """Which of `size` things the samples with these numbers are: all of them in each epoch, in an order of its own."""
    epoch, place = np.divmod(samples, size)
    return permute(place, size, _key(seed, epoch))


def _key(seed: int, epoch: Ints) -> Words:
    return _mix(_mix(np.full(epoch.shape, seed % 2**64, np.uint64)) ^ epoch.astype(np.uint64))


def permute(place: Ints, size: int, key: Words) -> Ints:
    """A bijection of 0 … size-1 for every key: where `place` goes.

    A Feistel network over the next larger even number of bits; what lands outside goes through again until it is
    inside ("cycle walking", Black and Rogaway 2002), 4 times at most on average.

    Args:
        place: numbers in 0 … size-1.
        size: ≥ 1.
        key: one for each place, same shape.
    """
    half = np.uint64(max(2, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [_mix(key ^ np.uint64(round_ + 1)) for round_ in range(ROUNDS)]
    out = place.astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key[todo]) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def _mix(word: Words) -> Words:
    """A bijection of 64-bit words in which every bit of the input moves every bit of the output (splitmix64)."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@dataclass(frozen=True)
class Split:
    """How a global batch is shared out: `accumulation` passes × `mesh.data` groups of ranks × `micro` samples."""

    mesh: Mesh
    micro: int
    accumulation: int

    @property
    def samples(self) -> int:
        """Samples of one global batch."""
        return self.accumulation * self.mesh.data * self.micro

    def share(self, step: int, index: int, rank: int) -> Ints:
        """The numbers of the samples, (micro,), of pass `index` of `step`, for one data-parallel index."""
        first = step * self.samples + (index * self.mesh.data + rank) * self.micro
        return np.arange(first, first + self.micro, dtype=np.int64)


def split_batch(tokens: int, context: int, micro: int | None, mesh: Mesh) -> Split:
    """Derives micro-batch and accumulation from the global batch.

    Args:
        tokens: of the global batch (`batch.tokens`).
        context: tokens of a sample (`batch.context`).
        micro: samples per device and pass (`batch.micro`); None: a device takes its whole share in one pass.
        mesh: all ranks; those of one data-parallel group have the same samples.

    Raises:
        UserError: the parts do not divide the whole; names the nearest `batch.tokens` that does.
    """
    ranks = mesh.data
    unit = context * ranks * (micro or 1)
    if tokens <= 0 or tokens % unit:
        lower, parts = tokens // unit * unit, [f"batch.context={context}"]
        parts += [f"batch.micro={micro}"] if micro else []
        parts += [f"{ranks} devices"] if ranks > 1 else []
        near = [lower, lower + unit] if lower > 0 else [unit]
        raise UserError(
            f"batch.tokens={tokens} is not a multiple of {unit} ({' × '.join(parts)})",
            "nearest: " + ", ".join(f"batch.tokens={value}" for value in near),
        )
    samples = tokens // context
    micro = micro or samples // ranks
    return Split(mesh, micro, samples // (ranks * micro))
