"""The cost of dividing a batch among processes: `python benchmarks/strategy_overhead.py [--quick]`.

The same global batch (B4 T512, L6 C512) through train.py: one process with 2 threads, and 2 processes with one thread
each under every strategy, on CPUs over gloo. The runs take turns; medians of their steps. Last line: one JSON object,
each strategy's tokens per second over those of the one process (1 = sharing is free).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import table

ROOT = Path(__file__).resolve().parent.parent
OVERRIDES = ["data=text", "model.n_layer=6", "model.n_embd=512", "batch.context=512", "batch.tokens=2048"]
FIXED = [
    "samples.tokens=0",
    "validation.batches=1",
    "validation.every.steps=1000",
    "checkpoint.every.steps=1000",
]
ONE_RANK = ["trainer.devices=1", "threads=2", "batch.micro=4"]
TWO_RANKS = ["trainer.devices=2", "threads=1", "batch.micro=2"]
WARM_UP_STEPS = 3  # steps at the start of each run that are not counted


def steps(overrides: list[str], count: int) -> list[float]:
    """Seconds of each step of a run in a directory of its own."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 1000)
        own = [f"data.path={text}", f"run.root={folder}", "run.name=run", f"budget.steps={count + WARM_UP_STEPS}"]
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "trainer.accelerator=cpu",
            *OVERRIDES,
            *FIXED,
            *own,
            *overrides,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines[WARM_UP_STEPS:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ddp alone, one turn")
    quick = parser.parse_args().quick
    names = ["ddp"] if quick else ["ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3"]
    times: dict[str, list[float]] = {name: [] for name in ["one process", *names]}
    for _ in range(1 if quick else 3):
        times["one process"] += steps([*ONE_RANK], 8)
        for name in names:
            times[name] += steps([*TWO_RANKS, f"strategy={name}"], 8)
    medians = {name: statistics.median(found) for name, found in times.items()}
    base = medians["one process"]
    rows = [[name, f"{seconds:.3f}", f"{base / seconds:.3f}"] for name, seconds in medians.items()]
    print(table(["2 cores, the same batch", "seconds a step", "speed"], rows))
    print(json.dumps({name: base / seconds for name, seconds in medians.items() if name != "one process"}))


if __name__ == "__main__":
    main()
