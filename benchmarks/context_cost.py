"""Cost against context length: `python benchmarks/context_cost.py [--quick]`.

Training: time and peak memory of one step (forward, backward) per token at T = 512 … 8192, tokens per step constant.
Generation: time per token and memory of the process after 32,768 tokens, over those after 1,024.
Prints a table, and as its last line one JSON object: time_ratio and memory_ratio (the worst T over T = 512),
generate_time_ratio and generate_memory_ratio. A ratio of 1 is a cost that does not depend on the context.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import measure
import torch

from rwkv_train.inference.generate import generate
from rwkv_train.models import LanguageModel, ModelConfig, build_model
from rwkv_train.training.loss import language_model_loss
from rwkv_train.training.throughput import keep_freed_memory

LENGTHS = (512, 1024, 2048, 4096, 8192)
TOKENS = 8192  # per step, for every length


def model() -> LanguageModel:
    return build_model(ModelConfig("rwkv4", n_layer=4, n_embd=128, vocab_size=256))


def step(network: LanguageModel, length: int, tokens: int = TOKENS) -> None:
    text = torch.randint(256, (tokens // length, length + 1), generator=torch.Generator().manual_seed(length))
    logits, _ = network(text[:, :-1])
    language_model_loss(logits, text[:, 1:]).backward()
    network.zero_grad()


def peak_memory(length: int) -> int:
    """Bytes that two steps need above the model itself, measured in a process of their own."""
    code = f"from context_cost import report_peak; report_peak({length})"
    folder = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def report_peak(length: int) -> None:
    network = model()
    step(network, 16, tokens=64)  # loads the operators, starts the threads
    before = measure.resident()
    measure.reset_peak()
    step(network, length)
    step(network, length)
    print(measure.peak() - before)


def generation(short: int, long: int, window: int) -> tuple[float, float]:
    """Time per token (medians of a window) and memory after `long` tokens, each over that after `short`."""
    network = build_model(ModelConfig("rwkv4", n_layer=4, n_embd=128, vocab_size=256))
    times, memory, count = [], {}, 0
    began = time.perf_counter()
    for _ in generate(network, [1], long + window, seed=0):
        now = time.perf_counter()
        times.append(now - began)
        began, count = now, count + 1
        if count in (short, long):
            memory[count] = measure.resident()
    early = statistics.median(times[short : short + window])
    late = statistics.median(times[long : long + window])
    return late / early, memory[long] / memory[short]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats of the same shapes, under 50 s")
    repeats = 5 if parser.parse_args().quick else 15
    keep_freed_memory()
    network = model()
    times: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for repeat in range(repeats + 1):
        for length in LENGTHS:  # interleaved: the machine's speed drifts
            began = time.perf_counter()
            step(network, length)
            if repeat:
                times[length].append(time.perf_counter() - began)
    medians = {length: statistics.median(times[length]) for length in LENGTHS}
    peaks = {length: peak_memory(length) for length in LENGTHS}
    print(f"RWKV-4 L4 C128 V256, {TOKENS} tokens a step, {torch.get_num_threads()} threads")
    print(f"{'T':>6} {'batch':>6} {'µs/token':>9} {'KiB/token':>10}")
    for length in LENGTHS:
        time_each, memory_each = medians[length] / TOKENS * 1e6, peaks[length] / TOKENS / 1024
        print(f"{length:>6} {TOKENS // length:>6} {time_each:>9.2f} {memory_each:>10.1f}")
    generate_time, generate_memory = generation(1024, 32768, 1024)
    print(f"generation after 32,768 tokens ÷ after 1,024: time {generate_time:.3f}, memory {generate_memory:.3f}")
    figures = {
        "time_ratio": max(medians.values()) / medians[512],
        "memory_ratio": max(peaks.values()) / peaks[512],
        "generate_time_ratio": generate_time,
        "generate_memory_ratio": generate_memory,
    }
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
