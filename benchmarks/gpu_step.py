"""A complete training step of RWKV-4 in bfloat16 on one GPU: tokens/s, and the share of the card's matmul rate.

    python benchmarks/gpu_step.py [--quick]

Forward under autocast, loss, backward, gradient clipping and fused AdamW; 169m, 430m and 1b5, with and without
torch.compile, 8 sequences of 1024 tokens (halved until they fit). MFU is 6 · matmul parameters · tokens/s over the peak
of the card's data sheet; matmul_fraction the same over the best rate of 4096³ and 8192³ in this run. The last line is
one JSON object. Without a GPU it prints that there is nothing to measure.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from measure import table
from torch import nn

from rwkv_train.models import ModelConfig, build_model

SIZES = {"169m": (12, 768), "430m": (24, 1024), "1b5": (24, 2048)}
VOCABULARY, T = 50277, 1024
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # dense bfloat16 FLOP/s


def matmul_rate() -> float:
    best = 0.0
    for n in (4096, 8192):
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for _ in range(12):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            a @ b
            end.record()
            end.synchronize()
            best = max(best, 2 * n**3 / (start.elapsed_time(end) / 1e3))
    return best


def step_seconds(model: nn.Module, forward: Any, B: int, rounds: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)
    tokens = torch.randint(VOCABULARY, (B, T + 1), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = forward(tokens[:, :-1])[0]
        nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def measure(size: str, compiled: bool, rate: float, rounds: int) -> dict[str, Any]:
    layers, channels = SIZES[size]
    config = ModelConfig("rwkv4", n_layer=layers, n_embd=channels, vocab_size=VOCABULARY)
    row: dict[str, Any] = {"size": size, "compile": compiled}
    B = 8
    while B >= 1:
        try:
            model = build_model(config).to("cuda")
            seconds = step_seconds(model, torch.compile(model) if compiled else model, B, rounds)
        except torch.cuda.OutOfMemoryError:
            model = None
            B //= 2
            torch.cuda.empty_cache()
            continue
        speed = B * T / seconds
        flops = model.flops_per_token(T) * speed
        peak = next((peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name()), None)
        row |= {"B": B, "tokens_per_s": round(speed), "matmul_fraction": round(flops / rate, 3)}
        row["mfu"] = None if peak is None else round(flops / peak, 3)
        row["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        torch.cuda.reset_peak_memory_stats()
        return row
    return row | {"failed": "not even one sequence fits"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="430m only, without torch.compile")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure")
        print(json.dumps({"steps": []}))
        return
    rate, rows = matmul_rate(), []
    for size in ("430m",) if quick else SIZES:
        for compiled in (False,) if quick else (False, True):
            try:
                rows.append(measure(size, compiled, rate, 5 if quick else 10))
            except Exception as error:  # the other sizes still count
                message = (str(error).splitlines() or [""])[0]
                rows.append({"size": size, "compile": compiled, "failed": f"{type(error).__name__}: {message}"})
            torch.cuda.empty_cache()
            print(rows[-1], flush=True)
    header = list(dict.fromkeys(name for row in rows for name in row))
    print(table(header, [[str(row.get(name, "")) for name in header] for row in rows]))
    print(json.dumps({"matmul_TFLOPs": round(rate / 1e12), "steps": rows}))


if __name__ == "__main__":
    main()
