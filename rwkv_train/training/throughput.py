"""Figures of a step, read without making the host wait for the device; matmul rate, utilisation, and the allocator."""

from __future__ import annotations

import ctypes
import itertools
import math
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def matmul_rate(device: torch.device, precision: str, threads: int) -> float:
    """FLOP/s of a square matrix product on this device, in the step's dtype: the best of a few, measured once.

    Args:
        device: where.
        precision: as in trainer.precision.
        threads: that torch uses now.
    """
    size, repeats = (1024, 12) if device.type == "cpu" else (8192, 8)
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    if device.type == "cpu" and dtype == torch.bfloat16:
        size = 256  # emulated on most CPUs
    generator = torch.Generator(device).manual_seed(0)  # a run's random numbers are not those of a measurement
    left, right = torch.randn(2, size, size, device=device, generator=generator).to(dtype).unbind()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def utilisation(flops_per_token: int, tokens_per_second: float, rate: float, devices: int) -> float:
    """Model FLOPs utilisation: the model's FLOPs per second over the matmul rate of all devices."""
    return flops_per_token * tokens_per_second / (rate * devices)


def keep_freed_memory() -> None:
    """Makes glibc keep memory that is freed from now on for the next step; memory that is free already is returned.

    By default it returns the pages of each large tensor at once, and every step faults them in again.
    """
    _set_allocator(mmap_threshold=1 << 30, trim_threshold=(1 << 31) - 1)


def return_freed_memory() -> None:
    """Makes glibc return each large tensor's pages to the system when it is freed.

    For ranks that shard the state because memory is short: gathered parameters, buckets and gradients come and go in
    all sizes, and the holes that they leave in a heap would be as large as a rank's shard.
    """
    _set_allocator(mmap_threshold=1 << 17, trim_threshold=1 << 17)


def _set_allocator(mmap_threshold: int, trim_threshold: int) -> None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        libc.mallopt(-3, mmap_threshold)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD
    except OSError:
        pass  # another C library


class Stopwatch:
    """Times the parts of a step: marks are set while the host runs ahead of the device, and read when it has caught up.

    Args:
        device: of a CUDA device the clock of its stream is read (events), else the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, part: str) -> None:
        """Ends a part of the step; "" is counted nowhere."""
        self._marks.append((part, self._now()))

    def lap(self) -> list[tuple[str, Any]]:
        """Returns the marks since the last lap, for `seconds`, and begins the next lap at the last of them."""
        marks, self._marks = self._marks, self._marks[-1:]
        return marks

    def seconds(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        """Seconds of each part of a lap that the device has completed."""
        spent: dict[str, float] = {}
        for (_, before), (part, now) in itertools.pairwise(marks):
            took = before.elapsed_time(now) / 1000 if self._cuda else now - before
            spent[part] = spent.get(part, 0.0) + took
        return spent


class AsyncHostCopy:
    """Starts a copy of values to the host; `values` waits for it, nothing else does.

    Args:
        values: scalars and tensors of one or two dimensions, by key.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.shapes = {key: tuple(value.shape) for key, value in values.items()}
        found = [value.detach() for value in values.values()]
        scalars = all(value.dim() == 0 and value.dtype == torch.float32 for value in found)
        flat = torch.stack(found) if scalars else torch.cat([value.reshape(-1).float() for value in found])
        self._copied: Any = None
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = flat

    def values(self) -> dict[str, Any]:
        """By key a number, a list of numbers, or a list of lists; waits until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()
        flat, found, offset = self._host.numpy().tolist(), {}, 0
        for key, shape in self.shapes.items():
            size = math.prod(shape)
            part = flat[offset : offset + size]
            found[key] = part[0] if not shape else part
            if len(shape) == 2:
                found[key] = [part[first : first + shape[1]] for first in range(0, size, shape[1])]
            offset += size
        return found
