"""Matmul rate of a device, model FLOPs utilisation, the time of a step's parts, and the allocator's settings."""

from __future__ import annotations

import ctypes
import itertools
import time
from typing import Any

import torch


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a square matrix product on this device, in the step's dtype: the best of a few."""
    size, repeats = (1024, 12) if device.type == "cpu" else (8192, 8)
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    if device.type == "cpu" and dtype == torch.bfloat16:
        size = 256  # emulated on most CPUs
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
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
