"""Tiny runs that tests start through the front door: their text comes from a seed, not from the machine."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    "data=text",
    "model.n_layer=2",
    "model.n_embd=32",
    "batch.context=32",
    "batch.tokens=128",
    "budget.steps=50",
    "optim.lr=1e-2",
    "optim.final_lr=1e-3",
    "optim.schedule.warmup.steps=5",
    "validation.every.steps=25",
    "checkpoint.every.steps=10",
    "samples.tokens=0",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "threads=1",
]


def write_text(path: Path, words: int = 4000) -> Path:
    """Sentences of made-up words, the same on every machine and Python."""
    draw = random.Random(7)
    syllables = ["ka", "lo", "mi", "ru", "te", "sa", "no", "vi", "pu", "de"]
    lexicon = ["".join(draw.choice(syllables) for _ in range(1 + number % 4)) for number in range(60)]
    text = " ".join(lexicon[min(draw.randrange(60), draw.randrange(60))] for _ in range(words))
    path.write_text(text.replace(" ka ", ". "))
    return path


def words_for(folder: Path, name: str = "run", *more: str) -> list[str]:
    """The words of a tiny run below a folder; later words replace earlier ones of the same key."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    words = [*TINY, f"data.path={text}", f"run.root={folder / 'runs'}", f"run.name={name}"]
    replaced = {word.split("=")[0] for word in more}
    return [word for word in words if word.split("=")[0] not in replaced] + list(more)


def start(words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """`python train.py WORDS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The training loss of steps 1, 2, …, each of which stands there exactly once."""
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["train/loss"] for row in found]


def same_weights(one: Path, other: Path) -> bool:
    """Whether the final weights of two runs are equal to the last bit."""
    first, second = (torch.load(run / "weights.pth", weights_only=True) for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
