"""How fast the machine multiplies matrices, what share of it a training step uses, and memory kept for speed."""

from __future__ import annotations

import ctypes
import time

import torch


def matmul_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of a matrix product on this device, in the step's dtype: best of a few."""
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


def utilisation(matmul_parameters: int, tokens_per_second: float, rate: float, devices: int) -> float:
    """Model FLOPs utilisation: 6 FLOPs a matmul parameter and token (forward 2, backward 4), over the devices' rate."""
    return 6 * matmul_parameters * tokens_per_second / (rate * devices)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step.

    By itself it gives the pages of each large tensor back at once, and every step faults them in again.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except OSError:
        pass  # another C library
