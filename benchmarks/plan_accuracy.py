"""The plan against measurements: `python benchmarks/plan_accuracy.py [--quick] [--jobs N]`.

Memory: two ranks over gloo on this machine's CPU train a model whose state takes more than 1 GB a rank, under DDP and
ZeRO 1 to 3, with and without activation checkpointing; each rank's peak above what it held before the model was there,
against the plan's. Counts: parameters and FLOPs of a pass against torch's own counter. Throughput: against every
published run of RWKV that names its cards. Last line: one JSON object; `worst_memory_error` and
`published_throughput_errors` are relative.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from measure import table
from torch.utils.flop_counter import FlopCounterMode

from rwkv_train.cli import launcher
from rwkv_train.config.mesh import Mesh
from rwkv_train.models import ModelConfig, build_model
from rwkv_train.planning.cards import CARDS, cpu_card
from rwkv_train.planning.model import count
from rwkv_train.planning.plan import make_plan
from rwkv_train.planning.speed import seconds_per_token

ROOT = Path(__file__).resolve().parent.parent
MODEL = ["model.n_layer=16", "model.n_embd=640", "batch.context=256", "batch.tokens=512", "batch.micro=1"]
RUN = ["trainer.accelerator=cpu", "trainer.devices=2", "threads=1", "trainer.precision=32-true"]
FIXED = [
    "budget.steps=3",
    "optim.schedule.warmup.steps=1",
    "samples.tokens=0",
    "checkpoint.every.steps=100",
    "validation.every.steps=100",
    "validation.batches=1",
    "data=text",
]
CASES = [
    ("ddp", False),
    ("deepspeed_1", False),
    ("deepspeed_2", False),
    ("deepspeed_3", False),
    ("deepspeed_2", True),
    ("deepspeed_3", True),
]

# What is published (shared figures of the field): arch and size; parameters that a token is multiplied with; layers,
# channels; cards; whether blocks are recomputed; tokens per second of all cards.
PUBLISHED = [
    ("RWKV-4 1.5B, 8 × A100-40G, context 1024", 1.515e9 - 50277 * 2048, 24, 2048, "a100-40g", 8, False, 106e3),
    ("RWKV-4 14B, 64 × A100-80G, context 4096", 1.415e10 - 50277 * 5120, 40, 5120, "a100-80g", 64, True, 114e3),
    (
        "RWKV-4 14B, 64 × A100-40G, 332e9 tokens in 3 months",
        1.415e10 - 50277 * 5120,
        40,
        5120,
        "a100-40g",
        64,
        True,
        42.7e3,
    ),
    ("RWKV-7 7.2B, 32 × H100, context 10240", 7.2e9 - 65536 * 4096, 32, 4096, "h100-80g", 32, True, 270e3),
]


class Peak(Callback):
    """This process's peak of resident memory in the steps, above what it held when the callback was made."""

    def __init__(self, folder: str, deepspeed: bool) -> None:
        if deepspeed:
            import deepspeed as _  # noqa: F401  its own memory is not the model's
        self.folder = Path(folder)
        self.before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak until now

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        peak = _status("VmHWM") - self.before
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(peak))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def overrides_of(strategy: str, recompute: bool, text: Path) -> list[str]:
    overrides = [*MODEL, *RUN, *FIXED, f"strategy={strategy}", f"data.path={text}"]
    return [*overrides, f"activation_checkpointing={str(recompute).lower()}"]


def measured(strategy: str, overrides: list[str]) -> float:
    """Bytes of the rank that holds most."""
    with tempfile.TemporaryDirectory() as folder:
        spy = f"{{_target_: plan_accuracy.Peak, folder: {folder}, deepspeed: {str('deepspeed' in strategy).lower()}}}"
        overrides = [*overrides, f"run.root={folder}", "run.name=run", "packages=[plan_accuracy]"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "train.py"), *overrides, f"+callbacks.peak={spy}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{strategy}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
        return max(json.loads(file.read_text()) for file in Path(folder).glob("*.json"))


def planned(overrides: list[str]) -> float:
    """The plan's bytes of one rank."""
    return make_plan(launcher.load(overrides), cpu_card(2), Mesh(2), 256, gpu=False).memory.device


def counts_are_exact() -> bool:
    """Parameters of the model, and FLOPs of one forward and backward pass by torch's counter, are the plan's."""
    shape, tokens = ModelConfig("rwkv4", 3, 96, 300), torch.zeros(2, 40, dtype=torch.int64)
    model, counts = build_model(shape), count(shape, "32-true")
    with FlopCounterMode(display=False) as counter:
        model(tokens)[0].sum().backward()
    parameters = sum(p.numel() for p in model.parameters())
    return (
        counts.parameters == parameters
        and counts.flops_per_token(tokens.shape[1]) * tokens.numel() == counter.get_total_flops()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one memory measurement instead of six")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time: memory does not depend on it")
    options = parser.parse_args()
    rows, errors = [], []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 600)
        cases = CASES[3:4] if options.quick else CASES
        overrides = [overrides_of(*case, text) for case in cases]
        with ThreadPoolExecutor(options.jobs) as pool:
            peaks = list(pool.map(measured, [strategy for strategy, _ in cases], overrides))
        for (strategy, recompute), typed, found in zip(cases, overrides, peaks, strict=True):
            predicted = planned(typed)
            errors.append(predicted / found - 1)
            kind = "recomputed" if recompute else "kept"
            rows.append([strategy, kind, f"{found / 1e9:.3f}", f"{predicted / 1e9:.3f}", f"{errors[-1]:+.1%}"])
    print(table(["strategy", "activations", "measured GB", "planned GB", "error"], rows))
    published, rows = {}, []
    for name, matmul, layers, channels, card, cards, recompute, reported in PUBLISHED:
        seconds = seconds_per_token(6 * int(matmul), layers, channels, float(recompute), CARDS[card], "bf16-mixed")
        published[name] = cards / seconds / reported - 1
        rows.append([name, f"{reported:,.0f}", f"{cards / seconds:,.0f}", f"{published[name]:+.0%}"])
    print(table(["published run", "tokens/s", "planned", "error"], rows))
    exact = counts_are_exact()
    print(f"parameters and FLOPs are {'exact' if exact else 'NOT exact'}")
    worst = max(errors, key=abs)
    figures = {"worst_memory_error": abs(worst), "published_throughput_errors": published, "counts_exact": exact}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
