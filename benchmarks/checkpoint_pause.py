"""How long a checkpoint stops the training: `python benchmarks/checkpoint_pause.py [--quick]`.

The same run of one process twice: checkpoints written in the background, and while training waits. Seconds that
training was paused for each save after the first (whose buffers are new), medians, against a step's. Last line: one
JSON object; `pause_vs_blocking` is the one over the other, `pause_vs_step` the pause over a step's time.
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
OVERRIDES = ["data=text", "model.n_layer=8", "batch.context=256", "batch.tokens=512", "trainer.accelerator=cpu"]
FIXED = ["samples.tokens=0", "validation.every.steps=1000", "validation.batches=1", "optim.schedule.warmup.steps=1"]


def saves(background: bool, channels: int, count: int, folder: Path) -> tuple[float, float, float]:
    """Seconds of a pause, of a step, and of a complete save."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 500)
    name = "background" if background else "blocking"
    overrides = [
        *OVERRIDES,
        *FIXED,
        f"model.n_embd={channels}",
        f"budget.steps={2 * count + 1}",
        "checkpoint.every.steps=2",
    ]
    overrides += [f"data.path={text}", f"run.root={folder}", f"run.name={name}", "checkpoint.keep=1"]
    command = [sys.executable, str(ROOT / "train.py"), *overrides, f"checkpoint.background={str(background).lower()}"]
    subprocess.run(command, check=True, capture_output=True)
    run = folder / name
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    found = [event for event in events if event["event"] == "checkpoint"][1:-1]
    steps = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (
        statistics.median(event["pause"] for event in found),
        statistics.median(steps[2::2]),  # the steps after which nothing is saved
        statistics.median(event["seconds"] for event in found),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    quick = parser.parse_args().quick
    channels, count = (512, 5) if quick else (768, 6)
    with tempfile.TemporaryDirectory() as folder:
        pause, step, write = saves(True, channels, count, Path(folder))
        blocking, _, _ = saves(False, channels, count, Path(folder))
    rows = [
        ["training stops, background", f"{pause:.3f}"],
        ["training stops, blocking", f"{blocking:.3f}"],
        ["a step", f"{step:.3f}"],
        ["the writing itself, in the background", f"{write:.3f}"],
    ]
    print(table(["", "seconds"], rows))
    print(
        json.dumps(
            {"pause_vs_blocking": pause / blocking, "pause_vs_step": pause / step, "parameters": 8 * 13 * channels**2}
        )
    )


if __name__ == "__main__":
    main()
