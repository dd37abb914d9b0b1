"""A cost model of wkv4 on a GPU, from published peak rates and counted instructions; docs/kernels.md derives it."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_train.ops.registration.wkv4 import COLUMN, segments_on


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU.

    Attributes:
        name: as vendors have it.
        multiprocessors: their number.
        clock: sustained, in Hz.
        bandwidth: of the memory, its published peak in bytes/s.
        copied: share of that peak that a large copy reaches.
        latency: of a load from memory, in seconds.
        launch: seconds from one launch to the next on a stream.
    """

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    copied: float = 0.92
    latency: float = 6e-7
    launch: float = 2.5e-6


A100 = Gpu("A100 80GB", 108, 1.41e9, 2.039e12)
H100 = Gpu("H100 SXM", 132, 1.755e9, 3.35e12)


@dataclass(frozen=True)
class KernelCost:
    """A kernel's cost per element with 16-bit storage.

    Instructions are counted in the main loop's SASS for sm_90, on the path of the usual case: complete eighths of
    chunks, |u + w| at most 40, no gradient of the last state.

    Attributes:
        bytes: moved to and from memory.
        instructions: issued by a thread.
        exponentials: and reciprocals, which the special function units compute.
        warps: the limit per multiprocessor, by registers.
        in_flight: bytes of a warp's loads that are outstanding at once.
    """

    bytes: float
    instructions: float
    exponentials: float
    warps: int
    in_flight: float


PARALLEL = {"forward": KernelCost(6.2, 51, 3.5, 16, 4096), "backward": KernelCost(10.2, 114, 5.5, 16, 6144)}
SUMMARY = {"forward": KernelCost(4, 21, 1.2, 24, 4096), "backward": KernelCost(6.2, 62, 3.5, 16, 6144)}
SEQUENTIAL = {"forward": KernelCost(6.2, 51, 3.0, 20, 2048), "backward": KernelCost(14.2, 91, 3.8, 12, 3072)}
FLOOR_BYTES = {"forward": 6, "backward": 10}  # per element: k, v, y; k, v, gy, dk, dv
OVERLAP = 0.75  # share of the shorter of memory and arithmetic that runs at the same time as the longer


@dataclass(frozen=True)
class Prediction:
    """What forward + backward should take.

    Attributes:
        segments: as `segments_on` counts them.
        seconds: of all launches.
        floor: seconds to move the bytes that must be moved, at the bandwidth of a copy.
    """

    segments: int
    seconds: float
    floor: float


def predict(gpu: Gpu, B: int, T: int, C: int, segments: int | None = None) -> Prediction:
    """What wkv4, forward and backward, should take in 16-bit storage; segments None: as `segments_on` chooses."""
    if segments is None:
        segments = segments_on(B, T, C, gpu.multiprocessors)
    seconds, columns = 0.0, B * -(-C // COLUMN)
    for way in ("forward", "backward"):
        if segments == 0:
            seconds += _launch(gpu, SEQUENTIAL[way], B * T * C, -(-columns // 2), 2)
        else:
            seconds += _launch(gpu, PARALLEL[way], B * T * C, columns * segments, 8)
        if segments > 1:
            share = (segments - 1) / segments
            seconds += _launch(gpu, SUMMARY[way], B * T * C * share, columns * (segments - 1), 8) + gpu.launch
    seconds += gpu.launch  # the sums for w and u
    floor = sum(FLOOR_BYTES.values()) * B * T * C / (gpu.bandwidth * gpu.copied)
    return Prediction(segments, seconds, floor)


def _launch(gpu: Gpu, kernel: KernelCost, elements: float, blocks: int, warps: int) -> float:
    """Seconds of one launch: memory (bandwidth, or too few loads in flight) against arithmetic, in complete waves."""
    busy = min(gpu.multiprocessors, blocks)
    resident = min(kernel.warps, warps * -(-blocks // gpu.multiprocessors))  # warps on a busy multiprocessor
    moved = min(gpu.bandwidth * gpu.copied, busy * resident * kernel.in_flight / gpu.latency)
    memory = kernel.bytes * elements / moved
    # A scheduler issues one instruction a cycle; a lone warp fills half of its slots, for lack of independent ones.
    issued = busy * 4 * min(1.0, 0.5 * resident / 4) * gpu.clock * 32
    arithmetic = max(kernel.instructions * elements / issued, kernel.exponentials * elements / (busy * 16 * gpu.clock))
    per_wave = gpu.multiprocessors * max(1, kernel.warps // warps)
    waves = blocks / per_wave
    tail = -(-blocks // per_wave) / waves if waves > 1 else -(-blocks // busy) * busy / blocks
    longer, shorter = max(memory, arithmetic * tail), min(memory, arithmetic * tail)
    return longer + (1 - OVERLAP) * shorter + gpu.launch
