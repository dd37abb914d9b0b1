"""Which samples step s reads: a pure function of (seed, step), independent of the number of ranks.

The token stream is cut into windows of one context each. Every epoch visits each window exactly once, in a new order,
and cuts the stream at a new offset, so that no two epochs have the same windows. The order is a keyed bijection that is
evaluated when needed: nothing is stored, and resuming needs only the step. ReferenceOrder is RWKV-LM's, for loss curves
that are compared with published ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from rwkv_train.config.mesh import Mesh
from rwkv_train.data.arrays import Ints, UnsignedInts
from rwkv_train.errors import UserError

FEISTEL_ROUNDS = 6  # four suffice with a pseudo-random round function (Luby and Rackoff 1988); ours is weaker


class StreamOrder(Protocol):
    """The order in which the windows of a token stream are read."""

    @property
    def windows(self) -> int:
        """Number of windows of one epoch."""

    def starts(self, samples: Ints) -> Ints:
        """The offset in the stream of each sample's first token, same shape; `samples` are numbers ≥ 0."""


@dataclass(frozen=True)
class ShuffledOrder:
    """A new random order of the windows in each epoch.

    Attributes:
        seed: any integer.
        tokens: length of the stream.
        context: tokens of a window; its targets reach one token further.

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
        """Number of windows of one epoch: those that fit after any offset below one context, at least one."""
        return max(1, self.tokens // self.context - 1)

    def starts(self, samples: Ints) -> Ints:
        """The offset in the stream of each sample's first token.

        Args:
            samples: numbers of samples, ≥ 0: step · samples per global batch + index in the batch.

        Returns:
            Offsets of the same shape; the last target of a sample is at offset + context.
        """
        epoch, index = np.divmod(samples, self.windows)
        key = _key(self.seed, epoch)
        room = self.tokens - self.windows * self.context  # offsets that keep the last target: one to two contexts
        offset = (_mix(key) % np.uint64(room)).astype(np.int64)
        return offset + permute(index, self.windows, key) * self.context


@dataclass(frozen=True)
class ReferenceOrder:
    """RWKV-LM's order (dataset.py of its v4neo to v7 trainers); the prime is computed as in its RWKV-v5/make_data.py.

    Sample n starts at context · (⌊p·(√5-1)/2⌋ · i³ mod p), where i = n + 1 and p is the largest prime up to
    ⌊tokens/context⌋ - 1 that is 2 modulo 3: cubing is a bijection modulo a prime above 3 only if it is 2 modulo 3.
    Every epoch of p samples has the same order, whatever the seed.

    Attributes:
        tokens: length of the stream.
        context: tokens of a window.

    Raises:
        UserError: the stream is too short for such a prime.
    """

    tokens: int
    context: int

    def __post_init__(self) -> None:
        _refuse_short(self.tokens, self.context)
        if self.tokens // self.context < 3:  # the smallest prime is 2
            raise UserError(
                f"data.order=reference needs three windows of batch.context={self.context}: {3 * self.context:,} "
                f"tokens, not {self.tokens:,}",
                "give more text, a shorter batch.context=…, or data.order=shuffled",
            )

    @cached_property
    def windows(self) -> int:
        """Number of windows of one epoch: the prime p."""
        from sympy import isprime

        return next(p for p in range(self.tokens // self.context - 1, 1, -1) if p % 3 == 2 and isprime(p))

    def starts(self, samples: Ints) -> Ints:
        """The offset in the stream of each sample's first token, same shape."""
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
    """The item of each sample, same shape, in 0 … size - 1: every epoch has all items, each in a new order."""
    epoch, index = np.divmod(samples, size)
    return permute(index, size, _key(seed, epoch))


def _key(seed: int, epoch: Ints) -> UnsignedInts:
    return _mix(_mix(np.full(epoch.shape, seed % 2**64, np.uint64)) ^ epoch.astype(np.uint64))


def permute(index: Ints, size: int, key: UnsignedInts) -> Ints:
    """Applies a bijection of 0 … size - 1 that depends on the key.

    A Feistel network over the next larger even number of bits. A result outside the range goes through again until it
    is inside (cycle walking, Black and Rogaway 2002): at most 4 rounds on average.

    Args:
        index: numbers in 0 … size - 1.
        size: ≥ 1.
        key: a key per index, same shape.

    Returns:
        The images, same shape.
    """
    half = np.uint64(max(2, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [_mix(key ^ np.uint64(round_ + 1)) for round_ in range(FEISTEL_ROUNDS)]
    out = index.astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key[todo]) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def _mix(value: UnsignedInts) -> UnsignedInts:
    """A bijection of 64-bit values in which every bit of the input moves every bit of the output (splitmix64)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True)
class Split:
    """How a global batch is divided: `accumulation` passes × `mesh.data` × `micro` samples.

    Attributes:
        mesh: all ranks of the run.
        micro: samples of a micro-batch, on one rank in one pass.
        accumulation: passes of a rank in one step.
    """

    mesh: Mesh
    micro: int
    accumulation: int

    @property
    def samples(self) -> int:
        """Samples of one global batch."""
        return self.accumulation * self.mesh.data * self.micro

    def share(self, step: int, index: int, rank: int) -> Ints:
        """The sample numbers, (micro,), of pass `index` of `step` on `rank`; every sample is in exactly one share."""
        first = step * self.samples + (index * self.mesh.data + rank) * self.micro
        return np.arange(first, first + self.micro, dtype=np.int64)


def split_batch(tokens: int, context: int, micro: int | None, mesh: Mesh) -> Split:
    """Derives micro-batch and accumulation from the global batch.

    Args:
        tokens: tokens of the global batch (`batch.tokens`).
        context: tokens of a sample (`batch.context`).
        micro: samples per device and pass (`batch.micro`); None: each device has a single pass.
        mesh: all ranks; those of one data-parallel group have the same samples.

    Raises:
        UserError: `tokens` is not a multiple of context × micro × ranks; names the nearest values that are.
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
