"""wkv4 on a GPU, measured and predicted, against a copy of the same bytes, one thread a channel, and other kernels.

    python benchmarks/wkv_gpu.py [--quick]

Forward + backward in bfloat16. The floor is 16 bytes an element (k, v, y; k, v, the gradient of y, dk, dv) at the
bandwidth of a large copy that is measured in the same run; flash-linear-attention's RWKV-4 kernel is measured too
where it is installed. Without a GPU only the prediction is printed, for an A100 and an H100. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import wkv_cost as cost
from measure import table
from torch import Tensor

from rwkv_train.ops import reference
from rwkv_train.ops.families import cuda_engines
from rwkv_train.ops.registration.wkv4 import segments_on

CHANNELS = {"169m": 768, "430m": 1024, "1b5": 2048, "3b": 2560, "7b": 4096, "14b": 5120}
LENGTHS = ((8, 1024), (2, 4096), (1, 16384), (1, 65536))


def predicted(gpu: cost.Gpu) -> list[dict[str, Any]]:
    rows = []
    for size, C in CHANNELS.items():
        for B, T in LENGTHS:
            ours, alone = cost.predict(gpu, B, T, C), cost.predict(gpu, B, T, C, 0)
            rows.append(
                {
                    "card": gpu.name,
                    "size": size,
                    "B": B,
                    "T": T,
                    "C": C,
                    "kernel": "sequential" if ours.segments == 0 else f"parallel, {ours.segments}",
                    "predicted_us": round(ours.seconds * 1e6),
                    "predicted_ratio": round(ours.seconds / ours.floor, 2),
                    "sequential_ratio": round(alone.seconds / ours.floor, 2),
                }
            )
    return rows


def milliseconds(run: Callable[[], object], seconds: float) -> float:
    """Median over as many calls as fit into about `seconds`, timed on the GPU."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 1e3 * seconds and len(times) < 200):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def copy_bytes_per_second(seconds: float) -> float:
    a = torch.empty(2**28, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    return 8 * a.numel() / (milliseconds(lambda: b.copy_(a), seconds) / 1e3)


def fla_kernel() -> Callable[..., Any] | None:
    try:
        from fla.ops.rwkv4 import fused_recurrent_rwkv4
    except Exception as error:  # not installed, or it does not import on this machine
        print(f"flash-linear-attention's kernel is not measured: {type(error).__name__}: {error}")
        return None
    kernel: Callable[..., Any] = fused_recurrent_rwkv4
    return kernel


class Case:
    """Inputs of one shape, and forward + backward with either kernel."""

    def __init__(self, B: int, T: int, C: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, device="cuda")  # noqa: E731
        self.decay, self.u = draw(C), draw(C)
        self.w = -self.decay.exp()
        self.k, self.v, self.g = (draw(B, T, C).bfloat16() for _ in range(3))
        self.state = reference.initial_state(self.k)

    def ours(self, segments: int) -> tuple[Tensor, ...]:
        forward, back = torch.ops.rwkv_train.wkv4_in_segments, torch.ops.rwkv_train.wkv4_in_segments_backward
        y, _, saved = forward(self.w, self.u, self.k, self.v, self.state, segments)
        return (y, *back(self.w, self.u, self.k, self.v, self.state, saved, self.g, None, segments))

    def fla(self, kernel: Callable[..., Any]) -> None:
        leaves = [x.detach().requires_grad_() for x in (self.decay, self.u, self.k, self.v)]
        y, _ = kernel(*leaves, self.state[:, :, None])
        torch.autograd.grad(y, leaves, self.g)

    def error(self, segments: int) -> float:
        """Of y, relative, against the definition in float64 on the first 64 channels of the first sequence."""
        part = [x[:64].double() for x in (self.w, self.u)]
        part += [x[:1, :512, :64].double() for x in (self.k, self.v)]
        exact, _ = reference.wkv4(*part, self.state[:1, :, :64].double())
        ours = self.ours(segments)[0][:1, :512, :64].double()
        return ((ours - exact).norm() / exact.norm()).item()


def measured(quick: bool) -> list[dict[str, Any]]:
    engine = cuda_engines()["wkv4"]
    assert engine.load(), engine.error
    budget = 0.1 if quick else 0.5
    bandwidth, other = copy_bytes_per_second(budget), fla_kernel()
    name, count = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).multi_processor_count
    nearest = min((cost.A100, cost.H100), key=lambda gpu: abs(gpu.multiprocessors - count))
    rows = []
    for row in predicted(nearest):
        B, T, C = row["B"], row["T"], row["C"]
        if quick and (row["size"] not in ("430m", "1b5") or (B, T) not in ((8, 1024), (1, 16384))):
            continue
        try:
            case, segments = Case(B, T, C), segments_on(B, T, C, count)
            time, floor = milliseconds(lambda: case.ours(segments), budget), 16e3 * B * T * C / bandwidth  # noqa: B023
            row |= {
                "card": name,
                "predicted_for": nearest.name,
                "us": round(time * 1e3),
                "ratio": round(time / floor, 2),
            }
            row |= {"copy_GBps": round(bandwidth / 1e9), "error": case.error(segments)}
            row["us_one_thread_a_channel"] = round(1e3 * milliseconds(lambda: case.ours(0), budget))  # noqa: B023
            if other is not None:
                row["us_fla"] = round(1e3 * milliseconds(lambda: case.fla(other), budget))  # noqa: B023
        except Exception as error:  # a shape that does not fit, or a peer that fails: the others still count
            row["failed"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        torch.cuda.empty_cache()
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    header = list(dict.fromkeys(name for row in rows for name in row))
    return table(header, [[_cell(row.get(name)) for name in header] for row in rows])


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.2g}" if isinstance(value, float) and value < 0.01 else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four shapes, fewer repeats")
    quick = parser.parse_args().quick
    if torch.cuda.is_available():
        rows = measured(quick)
    else:
        print("no GPU: predictions only")
        rows = predicted(cost.A100) + predicted(cost.H100)
    print(show(rows))
    print(json.dumps({"wkv4": rows}))


if __name__ == "__main__":
    main()
