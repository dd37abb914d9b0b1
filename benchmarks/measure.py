"""Shared by the benchmarks: both sides are measured in one process, in turn, with medians, so that load affects both.

Import it before torch: the threads then share their cores as those of a run do.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rwkv_train.cli import launcher

launcher.share_cores()
import torch  # noqa: E402

GIGA = 1e9


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every run in every round; a round calls each once."""
    for _ in range(warm_up):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that it had in memory since the last `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found.group(1))


def copy_bytes_per_second(elements: int, repeats: int = 5) -> float:
    """Bytes read and written per second by a copy between two float32 tensors, best of repeats."""
    a, b = torch.ones(elements), torch.ones(elements)
    return 8 * elements / min(seconds(lambda: b.copy_(a)) for _ in range(repeats))


def matmul_flops_per_second(m: int, k: int, n: int, repeats: int = 1) -> float:
    a, b = torch.randn(m, k), torch.randn(k, n)
    return 2 * m * k * n / min(seconds(lambda: a @ b) for _ in range(repeats))


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
