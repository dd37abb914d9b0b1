"""The CPU operator wkv4 against its floor, its linearity in T, its threads and its memory.

    python benchmarks/wkv_cpu.py [--quick]

The floor of forward + backward is the larger of moving 36 bytes an element (forward: k, v, y; backward: k, v, the
gradient of y, dk, dv; and one more) at the measured copy bandwidth, and 6 exponentials an element at the faster of
torch.exp and ours. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
from pathlib import Path

import measure
import torch

from rwkv_train import ops
from rwkv_train.ops import build
from rwkv_train.ops.families import FAMILIES
from rwkv_train.training.throughput import keep_freed_memory

EXPONENTIAL = """
#include "cpu.h"
extern "C" void exponential(float *x, float *y, int64_t n, int64_t repeats) {
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i < n; ++i) y[i] = rwkv::exp_negative(x[i]);
    x[r % n] = -float(r % 80);
  }
}
"""


def our_exponentials_per_second() -> float:
    """Of one thread, on data in the first-level cache."""
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory) / "exponential.cpp", Path(directory) / "exponential.so"
        source.write_text(EXPONENTIAL)
        flags = build.FLAGS.replace("-fvisibility=hidden", "").split()
        include = f"-I{build.source_directory()}"
        subprocess.run([build.find_compiler(), *flags, include, "-shared", str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).exponential
    x, y, n, repeats = -torch.rand(2048) * 20, torch.empty(2048), 2048, 2000
    call = [ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(n), ctypes.c_int64(repeats)]
    return n * repeats / min(measure.seconds(lambda: function(*call)) for _ in range(7))


def torch_exponentials_per_second() -> float:
    x = -torch.rand(64 * 1024) * 20
    out = torch.empty_like(x)
    return x.numel() / min(measure.seconds(lambda: torch.exp(x, out=out)) for _ in range(300))


class Case:
    """Inputs of one shape and the step that is measured: forward, and backward with the gradient given."""

    def __init__(self, B: int, T: int, C: int) -> None:
        self.elements = B * T * C
        draw = [torch.randn(C), torch.randn(C), torch.randn(B, T, C), torch.randn(B, T, C)]
        draw[0] = -torch.exp(draw[0])
        self.inputs = [x.requires_grad_() for x in draw]
        self.gradient = torch.randn(B, T, C)

    def step(self) -> None:
        y, _ = ops.wkv4(*self.inputs)
        torch.autograd.grad(y, self.inputs, self.gradient)


def extra_memory(B: int, T: int, C: int) -> float:
    """Peak memory of a step beyond inputs and outputs, in units of one (B, T, C) tensor."""
    case = Case(B, T, C)
    Case(B, 64, C).step()
    before = measure.resident()
    measure.reset_peak()
    case.step()
    outputs = 3  # y, dk, dv
    return (measure.peak() - before) / (4 * case.elements) - outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under 50 seconds")
    rounds = 7 if parser.parse_args().quick else 25
    engine = FAMILIES["wkv4"].cpp
    assert engine.load(), engine.error
    memory = extra_memory(1, 65536, 512)  # before the allocator is set to keep freed memory
    keep_freed_memory()
    threads = torch.get_num_threads()

    case = Case(4, 1024, 1024)
    bandwidths: list[float] = []
    exponentials = 0.0
    alone: list[float] = []
    together: list[float] = []
    case.step()
    for _ in range(rounds):  # the floor and the operator are measured in turn, in every round
        bandwidths.append(measure.copy_bytes_per_second(8 * case.elements, 2))  # far beyond any cache
        exponentials = max(exponentials, our_exponentials_per_second() * threads, torch_exponentials_per_second())
        together.append(measure.seconds(case.step))
        torch.set_num_threads(1)
        alone.append(measure.seconds(case.step))
        torch.set_num_threads(threads)
    bandwidth = measure.median(bandwidths)
    by_bytes, by_exponentials = 36 * case.elements / bandwidth, 6 * case.elements / exponentials
    floor, time = max(by_bytes, by_exponentials), measure.median(together)

    del case
    short, long = Case(128, 1024, 256), Case(2, 65536, 256)
    times = measure.in_turn({"short": short.step, "long": long.step}, max(3, rounds // 3))
    result = {
        "floor_ratio": round(time / floor, 3),
        "linearity_65536_vs_1024": round(measure.median(times["long"]) / measure.median(times["short"]), 3),
        "threads_2_vs_1": round(measure.median(alone) / time, 3),
        "extra_memory": round(memory, 4),
        "bytes_are_the_floor": by_bytes > by_exponentials,
    }
    rows = [
        ["forward + backward, B4 T1024 C1024", f"{time * 1e3:.1f} ms", "best " + f"{min(together) * 1e3:.1f} ms"],
        ["floor by 36 bytes an element", f"{by_bytes * 1e3:.1f} ms", f"{bandwidth / measure.GIGA:.1f} GB/s copied"],
        [
            "floor by 6 exponentials an element",
            f"{by_exponentials * 1e3:.1f} ms",
            f"{exponentials / measure.GIGA:.1f} G/s",
        ],
        [
            "one thread",
            f"{measure.median(alone) * 1e3:.1f} ms",
            f"{threads} threads {result['threads_2_vs_1']:.2f} × as fast",
        ],
        ["B128 T1024 C256", f"{measure.median(times['short']) * 1e3:.1f} ms", ""],
        [
            "B2 T65536 C256",
            f"{measure.median(times['long']) * 1e3:.1f} ms",
            f"{result['linearity_65536_vs_1024']:.2f} ×",
        ],
        ["memory beyond inputs and outputs", f"{memory:.3f}", "of one (B, T, C) tensor, B1 T65536 C512"],
    ]
    print(measure.table(["what", "measured", "for comparison"], rows))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
