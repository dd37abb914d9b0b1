"""Directories of runs as training leaves them, made in milliseconds: what docs/metrics.md names, and more."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAYERS = 4


def rows(steps: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Of metrics.jsonl; the loss has one spike, in the middle."""
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        loss = 1.2 + 4 * math.exp(-3 * step / steps) + draw.gauss(0, 0.08)
        if step == steps // 2:
            loss += 5
        seconds = 0.1 + 0.01 * draw.random()
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * 1024,
            "time": 1.7e9 + 0.105 * step,
            "hours": 0.105 * step / 3600,
            "train/loss": loss,
            "train/bits_per_byte": loss / math.log(2),
            "lr": 1e-3 * (1 - step / (steps + 1)),
            "grad_norm": abs(draw.gauss(1, 0.3)),
            "grad_norm_clipped": min(1.0, abs(draw.gauss(1, 0.3))),
            "clip_share": draw.random(),
            "skipped": 0,
            "seconds": seconds,
            "tokens_per_second": 1024 / seconds,
            "mfu": 0.4 + 0.01 * draw.random(),
            "time/data": 1e-3 * draw.random(),
            "time/forward": 0.03,
            "time/backward": 0.05,
            "time/optimizer": 0.01,
            "time/checkpoint": 0.0,
            "goodput": 0.97,
            "memory": 1234567890,
        }
        if step % max(1, steps // 10) == 0 or step % 100 == 0:
            row |= {
                "val/loss": loss + 0.05,
                "val/bits_per_byte": (loss + 0.05) / math.log(2),
                "val/perplexity": math.exp(loss),
                "update_ratio": 1e-3 * draw.random(),
                "max_logit": 12 + draw.random(),
                "decay/half_life": [
                    [0.1, 0.5, 3.0 + layer + step / steps, 40.0 * layer + 9, 800.0] for layer in range(LAYERS)
                ],
            }
            names = ("grad_norm", "update_ratio", "state_rms", "receptance_saturated", "contribution", "own")
            row |= {f"layers/{name}": [draw.random() for _ in range(LAYERS)] for name in names}
        yield row


def make_run(path: Path, steps: int = 200, seed: int = 0, lr: float = 1e-3) -> Path:
    """Everything that a report reads."""
    path.mkdir(parents=True)
    with open(path / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(steps, seed))
    (path / "config.yaml").write_text(f"seed: {seed}\noptim: {{lr: {lr}}}\nrun: {{name: {path.name!r}}}\n")
    events: list[tuple[str, int, dict[str, Any]]] = [
        ("started", 0, {}),
        ("checkpoint", steps // 4, {}),
        ("interrupted", steps // 3, {"signal": "SIGTERM"}),
        ("resumed", steps // 3, {}),
        ("loss_spike", steps // 2, {"z": 31.5}),
        ("finished", steps, {}),
    ]
    lines = [{"time": 1.7e9 + step, "event": event, "step": step, **rest} for event, step, rest in events]
    (path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [(0, "def \x01??"), (steps, "def main(argv):\n    return </script><b>")]
    (path / "samples.txt").write_text("".join(f"===== after {at} steps =====\n{text}\n\n" for at, text in texts))
    bins = [{"from": 2**n // 2 + 1, "to": 2**n, "tokens": 9, "nats_per_token": 2 - 0.1 * n} for n in range(8)]

    def source(name: str) -> dict[str, Any]:
        figures = {"nats_per_token": 1.2345, "perplexity": 3.43, "bits_per_byte": 1.78, "by_position": bins}
        return {"name": name, "tokens": 9999, "of_tokens": 9999, "bytes": 9999, **figures}

    evaluation = {
        "step": steps,
        "context": 128,
        "sources": [source("books"), source("code")],
        "all": source("all"),
        "tasks": {"our_choice": {"acc": 0.31}},
    }
    (path / "eval.json").write_text(json.dumps(evaluation))
    return path
