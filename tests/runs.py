"""Tiny runs that tests start as users do; their text is generated from a seed and equal on every machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, BinaryIO

import torch

from rwkv_train import resources
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.storage import LocalStorage, Storage
from rwkv_train.cli import launcher
from rwkv_train.data import workers
from rwkv_train.training.run import train
from tests import PRELOAD

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    "arch=rwkv4",
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


def overrides_for(folder: Path, name: str = "run", *more: str) -> list[str]:
    """The overrides of a tiny run below a folder; later ones replace earlier ones of the same setting."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    overrides = [*TINY, f"data.path={text}", f"run.root={folder / 'runs'}", f"run.name={name}"]
    replaced = {override.split("=")[0] for override in more}
    return [override for override in overrides if override.split("=")[0] not in replaced] + list(more)


def start(overrides: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """`python train.py OVERRIDES` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "train.py", *overrides],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class SlowStorage(LocalStorage):
    """Takes its time over each file, so that a save lasts longer than the steps between two of them.

    Args:
        saving: a file that is there while a checkpoint is being written.
        seconds: for each file, of which a checkpoint has four or more.
    """

    def __init__(self, saving: Path, seconds: float = 0.04) -> None:
        self.saving, self.seconds = saving, seconds

    @contextmanager
    def write(self, path: Path) -> Iterator[BinaryIO]:
        with super().write(path) as file:
            self.saving.touch()
            yield file
            time.sleep(self.seconds)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.saving.unlink(missing_ok=True)


def _train_slow_saving(overrides: Sequence[str], saving: Path) -> None:
    sys.exit(train(launcher.load(overrides), SlowStorage(saving)))


def start_slow_saving(overrides: Sequence[str], saving: Path) -> ForkServerProcess:
    """A run with that storage in a process of its own, whose imports are done already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_train_slow_saving, args=(overrides, saving))
    process.start()
    return process


def train_ranks(
    overrides: Sequence[str], ranks: int, seconds: float = 150, prepare: Callable[[], None] | None = None
) -> None:
    """A run of several ranks, started as torchrun would, in processes whose imports are done already.

    Args:
        overrides: of the command line.
        ranks: processes.
        seconds: after which the test fails.
        prepare: a function of a test module that each process calls before it trains.
    """
    processes = start_ranks(overrides, ranks, prepare=prepare)
    try:
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
            process.join()


def start_ranks(
    overrides: Sequence[str], ranks: int, storage: Storage | None = None, prepare: Callable[[], None] | None = None
) -> list[ForkServerProcess]:
    """The same, not waited for.

    Args:
        overrides: of the command line.
        ranks: processes.
        storage: of the checkpoints, each rank has its own copy.
        prepare: as in `train_ranks`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = [
        *(override for override in overrides if not override.startswith("trainer.devices=")),
        f"trainer.devices={ranks}",
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=_train_rank, args=(overrides, rank, ranks, port, storage, prepare))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def _train_rank(
    overrides: Sequence[str],
    rank: int,
    ranks: int,
    port: int,
    storage: Storage | None,
    prepare: Callable[[], None] | None,
) -> None:
    # tests of `rwkv-train prepare` may have started the session's fork server with these blocked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, workers.RUN_SIGNALS)
    if prepare is not None:
        prepare()
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    # more ranks than cores: fine for a test, and refused to users
    resources.__dict__["cpu_cores"] = lambda: max(ranks, os.cpu_count() or 1)
    sys.exit(
        launcher.main(list(overrides))
        if storage is None
        else train(launcher.load(overrides), storage, launcher.rank_info())
    )


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The training loss of steps 1, 2, …; metrics.jsonl has each step exactly once."""
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["train/loss"] for row in found]


def stopped_at(run: Path, step: int, name: str) -> Path:
    """A copy of a run as if it had been stopped after a step."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if CheckpointName.of(checkpoint).step > step:
            shutil.rmtree(checkpoint)
    return copy


def same_weights(one: Path, other: Path) -> bool:
    """Whether the final weights of two runs are equal to the last bit."""
    first, second = (torch.load(run / "weights.pth", weights_only=True) for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def save_weights(path: Path, n_layer: int, n_embd: int, vocab_size: int = 256) -> Path:
    weights: dict[str, torch.Tensor] = {"emb.weight": torch.zeros(vocab_size, n_embd)}
    for layer in range(n_layer):
        weights |= {f"blocks.{layer}.att.{name}": torch.zeros(n_embd) for name in ("time_first", "time_decay")}
        weights[f"blocks.{layer}.ffn.key.weight"] = torch.zeros(4 * n_embd, n_embd, dtype=torch.bfloat16)
    torch.save(weights, path)
    return path
