"""The overhead of the framework: `python benchmarks/framework_overhead.py [--quick]`.

Time of a training step through train.py (Lightning, callbacks, records) against a bare loop of the same model, batch,
optimiser and clipping, at the default run's shape and at L6 C512 B4 T128; the time from the start of
`python train.py` to its first step; and the time of a step beside a process that keeps one core busy, over that alone.
The two sides take turns in one process; medians. Last line: one JSON object, `overhead` is the worse of the two shapes
(0.01 = 1 % slower than the bare loop).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import torch

from rwkv_train.cli import launcher
from rwkv_train.config import Config
from rwkv_train.data.batches import Batches
from rwkv_train.models import ModelConfig, build_model, recipe_of
from rwkv_train.training.loss import language_model_loss
from rwkv_train.training.optim import build_optimizer, learning_rate, parameter_groups
from rwkv_train.training.throughput import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "default": [],
    "L6 C512 B4 T128": ["model.n_layer=6", "model.n_embd=512", "batch.context=128", "batch.tokens=512"],
}
WARM_UP_STEPS = 3  # steps at the start of each turn that are not counted


def through_train(overrides: list[str], steps: int) -> list[float]:
    """Seconds of each step of a run through the front door, from its own records."""
    with tempfile.TemporaryDirectory() as root:
        fixed = [f"run.root={root}", "run.name=bench", f"budget.steps={steps}", "samples.tokens=0", "data.hold_out=0"]
        seldom = ["checkpoint.every.steps=1000000", "validation.every.steps=1000000"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = launcher.main([*overrides, *fixed, *seldom])
        assert code == 0, printed.getvalue()
        lines = (Path(root) / "bench" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines[WARM_UP_STEPS:]]


def bare_loop(config: Config, data: Batches, steps: int) -> list[float]:
    """Seconds of each step of the plainest loop that does the same arithmetic."""
    shape = config.model
    model = build_model(
        ModelConfig(config.arch, shape.n_layer, shape.n_embd, data.vocab_size, shape.dim_ffn), config.seed
    )
    optimizer = build_optimizer(parameter_groups(model, recipe_of(model), config.optim.weight_decay), config.optim)
    tokens, targets, *_ = data.batch(0, 0)
    times, batch = [], config.batch.tokens
    for step in range(steps):
        began = time.perf_counter()
        rate = learning_rate(config.optim, step * batch, (steps - 1) * batch, batch)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        logits, _ = model(tokens)
        optimizer.zero_grad()
        language_model_loss(logits, targets, config.optim.l2wrap).backward()
        if config.optim.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        times.append(time.perf_counter() - began)
    return times[WARM_UP_STEPS:]


def beside_a_busy_process(rounds: int) -> float:
    """Seconds of a step of `python train.py` while another process never sleeps, over those of a step without it."""
    ratios = []
    for _ in range(rounds):
        alone = in_own_process()
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
            ratios.append(in_own_process() / alone)
            neighbour.kill()
    return measure.median(ratios)


def in_own_process() -> float:
    """Mean seconds of a step of the default run's shape."""
    with tempfile.TemporaryDirectory() as root:
        overrides = [f"run.root={root}", "run.name=own", "budget.steps=25", "samples.tokens=0", "data.hold_out=0"]
        subprocess.run([sys.executable, "train.py", *overrides], cwd=ROOT, check=True, capture_output=True)
        lines = (Path(root) / "own" / "metrics.jsonl").read_text().splitlines()
    return statistics.mean(json.loads(line)["seconds"] for line in lines[WARM_UP_STEPS:])


def start_up() -> float:
    """Seconds from the start of the process to the end of its first step."""
    with tempfile.TemporaryDirectory() as root:
        overrides = [f"run.root={root}", "run.name=start", "budget.steps=1", "samples.tokens=0", "data.hold_out=0"]
        began = time.time()
        subprocess.run([sys.executable, "train.py", *overrides], cwd=ROOT, check=True, capture_output=True)
        first = (Path(root) / "start" / "metrics.jsonl").stat().st_mtime
    return first - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds of the same shapes, under 50 s")
    quick = parser.parse_args().quick
    rounds, steps = (3, 12) if quick else (7, 25)
    keep_freed_memory()
    overheads = {}
    print(f"{'shape':<18} {'bare ms':>9} {'train.py ms':>12} {'overhead':>9}")
    for name, overrides in SHAPES.items():
        config = launcher.load([*overrides, "data.hold_out=0"])
        data = Batches(config.data, config.batch, config.seed)
        bare, whole, ratios = [], [], []
        for _ in range(rounds):
            bare.append(measure.median(bare_loop(config, data, steps)))
            whole.append(measure.median(through_train(overrides, steps)))
            ratios.append(whole[-1] / bare[-1])
        overheads[name] = measure.median(ratios) - 1
        medians = measure.median(bare) * 1e3, measure.median(whole) * 1e3
        print(f"{name:<18} {medians[0]:>9.1f} {medians[1]:>12.1f} {overheads[name]:>9.1%}")
    started = start_up()
    print(f"start of train.py to the end of the first step: {started:.1f} s")
    busy = beside_a_busy_process(1 if quick else 3)
    print(f"a step beside a busy process: {busy:.2f} × as long")
    figures = {"overhead": max(overheads.values()), "start_seconds": started, "beside_a_busy_process": busy}
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
