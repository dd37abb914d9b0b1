"""Which wkv4 kernel runs on a card, and what it should cost there. docs/kernels.md has the reasoning."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 64  # steps, as in cuda/kernels.h
COLUMN = 64  # channels of one block of the parallel kernels
LEAST_CHUNKS = 16  # in a segment: segments then cost less memory than 1/64 of a (B, T, C) float32 tensor
FILLING = 5  # warps of the sequential kernel on a multiprocessor; with more, cutting time is no gain


def segments_on(B: int, T: int, C: int, multiprocessors: int) -> int:
    """How wkv4 cuts (B, T, C) on a card: 0 is the sequential kernel, n > 0 the parallel one with time in n segments.

    Sequential where its warps alone keep the card busy. Parallel otherwise; segments cost a second reading of inputs,
    so time is cut only where its blocks would leave more than half of the multiprocessors idle, and then into no more
    blocks than two a multiprocessor, which all run at once.
    """
    columns = B * -(-C // COLUMN)
    if columns >= FILLING * multiprocessors:
        return 0
    most = max(1, -(-T // CHUNK) // LEAST_CHUNKS)
    return 1 if 2 * columns > multiprocessors else min(most, 2 * multiprocessors // columns)


@dataclass(frozen=True)
class Card:
    """What the model knows of a card: published peaks, and the share of the bandwidth that a large copy reaches."""

    name: str
    multiprocessors: int
    clock: float  # Hz, sustained
    bandwidth: float  # bytes/s, peak
    copied: float = 0.92  # of the peak
    latency: float = 6e-7  # s, of a load from memory
    launch: float = 2.5e-6  # s, from one launch to the next on a stream


A100 = Card("A100 80GB", 108, 1.41e9, 2.039e12)
H100 = Card("H100 SXM", 132, 1.755e9, 3.35e12)


@dataclass(frozen=True)
class Kernel:
    """One kernel's cost per element, 16-bit storage; instructions counted in its main loop's SASS for sm_90, on the
    path of the usual case: whole eighths of chunks, |u + w| at most 40, no gradient of the last state.
    """

    bytes: float
    instructions: float
    exponentials: float  # and reciprocals: what the special function units do
    warps: int  # most on a multiprocessor, by registers
    ahead: float  # bytes of a warp that are on their way at once


PARALLEL = {"forward": Kernel(6.2, 51, 3.5, 16, 4096), "backward": Kernel(10.2, 114, 5.5, 16, 6144)}
SUMMARY = {"forward": Kernel(4, 21, 1.2, 24, 4096), "backward": Kernel(6.2, 62, 3.5, 16, 6144)}
SEQUENTIAL = {"forward": Kernel(6.2, 51, 3.0, 20, 2048), "backward": Kernel(14.2, 91, 3.8, 12, 3072)}
FLOOR = {"forward": 6, "backward": 10}  # bytes an element: k, v, y; k, v, gy, dk, dv
HIDDEN = 0.75  # of the shorter of memory and arithmetic, how much hides behind the longer


@dataclass(frozen=True)
class Prediction:
    """Seconds of forward + backward, and of its floor: the bytes that must be moved at the bandwidth of a copy."""

    segments: int
    seconds: float
    floor: float


def predict(card: Card, B: int, T: int, C: int, segments: int | None = None) -> Prediction:
    """What wkv4, forward and backward, should take in 16-bit storage; segments None: as `segments_on` chooses."""
    if segments is None:
        segments = segments_on(B, T, C, card.multiprocessors)
    seconds, columns = 0.0, B * -(-C // COLUMN)
    for way in ("forward", "backward"):
        if segments == 0:
            seconds += _launch(card, SEQUENTIAL[way], B * T * C, -(-columns // 2), 2)
        else:
            seconds += _launch(card, PARALLEL[way], B * T * C, columns * segments, 8)
        if segments > 1:
            share = (segments - 1) / segments
            seconds += _launch(card, SUMMARY[way], B * T * C * share, columns * (segments - 1), 8) + card.launch
    seconds += card.launch  # the sums for w and u
    floor = sum(FLOOR.values()) * B * T * C / (card.bandwidth * card.copied)
    return Prediction(segments, seconds, floor)


def _launch(card: Card, kernel: Kernel, elements: float, blocks: int, warps: int) -> float:
    """Seconds of one launch: memory (bandwidth, or too few loads on their way) against arithmetic, in whole waves."""
    busy = min(card.multiprocessors, blocks)
    resident = min(kernel.warps, warps * -(-blocks // card.multiprocessors))  # warps on a busy multiprocessor
    moved = min(card.bandwidth * card.copied, busy * resident * kernel.ahead / card.latency)
    memory = kernel.bytes * elements / moved
    # A scheduler issues one instruction a cycle; a lone warp fills half of its slots, for want of independent ones.
    issued = busy * 4 * min(1.0, 0.5 * resident / 4) * card.clock * 32
    arithmetic = max(kernel.instructions * elements / issued, kernel.exponentials * elements / (busy * 16 * card.clock))
    per_wave = card.multiprocessors * max(1, kernel.warps // warps)
    waves = blocks / per_wave
    tail = -(-blocks // per_wave) / waves if waves > 1 else -(-blocks // busy) * busy / blocks
    longer, shorter = max(memory, arithmetic * tail), min(memory, arithmetic * tail)
    return longer + (1 - HIDDEN) * shorter + card.launch
