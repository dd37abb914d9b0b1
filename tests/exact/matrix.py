"""Several runs in one process group, without a run directory: losses, gradient norms and final weights of each."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.callbacks import Callback

from rwkv_train.checkpoint.shards import WEIGHT
from rwkv_train.cli import launcher
from rwkv_train.cluster.rank_info import RankInfo
from rwkv_train.config import Config
from rwkv_train.config.clock import TokenClock
from rwkv_train.data.datamodule import DataModule
from rwkv_train.models import ARCHITECTURES, build_model
from rwkv_train.planning import resolved
from rwkv_train.training.build import build_module, build_trainer
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.setup import assemble, total_steps
from rwkv_train.training.strategy import ShardedStrategy, build_strategy
from tests.oracles.models import small_shape
from tests.runs import write_text

Floats = npt.NDArray[np.float32]

SAMPLES, CONTEXT, LR = 8, 32, 1e-2
CLIP = 0.25  # below every gradient norm of these runs
# 96 rows of 32 float32 have 12 KiB: whole pages of memory are new, wherever the tensor begins
NEW_TOKENS = [f"<|{number}|>" for number in range(96)]


@dataclass(frozen=True)
class Cell:
    """One run of the matrix.

    Args:
        strategy: a name of conf/strategy, or "single".
        micro: samples of a pass of one rank; SAMPLES on all ranks and in all passes of a step.
        precision: "32-true" or "bf16-mixed".
        clip: the largest gradient norm; None: no clipping.
        extended: whether the vocabulary grows by NEW_TOKENS.
        masked: whether the data are packed chats, whose micro-batches predict unequal numbers of tokens.
        arch: the architecture.
    """

    strategy: str
    micro: int
    precision: str = "32-true"
    clip: float | None = CLIP
    extended: bool = False
    masked: bool = False
    arch: str = "rwkv4"

    @property
    def steps(self) -> int:
        """After a step weights differ by a float32 rounding, which bfloat16 may round to different numbers."""
        return 1 if self.precision == "bf16-mixed" else 2

    def alone(self) -> Cell:
        """The run of one process that this one equals.

        In float32 that of one pass. In bfloat16 that of the same micro-batches, since each pass rounds its gradients.
        """
        return replace(self, strategy="single", micro=self.micro if self.precision == "bf16-mixed" else SAMPLES)


@dataclass(frozen=True)
class Outcome:
    """What a rank has of a run: loss and gradient norm of each step, and (first element, values) of its weights."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, list[tuple[int, Floats]]]


def write_inputs(folder: Path) -> None:
    """A text, chats of unequal lengths, and initial weights whose gradients are large."""
    write_text(folder / "text.txt", words=2000)
    draw = random.Random(5)
    with (folder / "chat.jsonl").open("w") as file:
        for _ in range(120):
            texts = ["".join(draw.choice("abcd ") for _ in range(draw.randint(1, 24))) for _ in range(2)]
            messages = [{"role": r, "content": t} for r, t in zip(("user", "assistant"), texts, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")
    for arch in ARCHITECTURES:
        model, generator = build_model(small_shape(arch, 2, 32, 256)), torch.Generator().manual_seed(6)
        weights = {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in model.state_dict().items()}
        torch.save(weights, folder / f"{arch}.pth")


@cache
def _config(folder: Path, arch: str, steps: int, extended: bool, masked: bool) -> Config:
    """The config of the runs with these properties; all others are replaced in it."""
    data = ("data=chat", f"data.path={folder}/chat.jsonl", "data.tokenizer=bytes", "data.hold_out=0")
    return launcher.load(
        [
            *(data if masked else ("data=text", f"data.path={folder}/text.txt")),
            f"init.weights={folder}/{arch}.pth",
            f"vocab.extend={json.dumps(NEW_TOKENS if extended else [])}",
            f"run.root={folder}/runs",
            f"batch.tokens={SAMPLES * CONTEXT}",
            f"batch.context={CONTEXT}",
            f"budget.steps={steps}",
            f"optim.lr={LR}",
            f"optim.final_lr={LR}",
            "optim.schedule.shape=constant",
            "optim.schedule.warmup.steps=0",
            "optim.eps=1e-3",  # not small beside the gradients: their scale reaches the weights
            "trainer.accelerator=cpu",
            "trainer.devices=1",
            "threads=1",
        ]
    )


def config_of(cell: Cell, folder: Path, ranks: int) -> Config:
    config = _config(folder, cell.arch, cell.steps, cell.extended, cell.masked)
    return replace(
        config,
        strategy=cast(Any, "auto" if cell.strategy == "single" else cell.strategy),
        batch=replace(config.batch, micro=cell.micro),
        optim=replace(config.optim, clip=cell.clip),
        trainer=replace(config.trainer, devices=ranks, precision=cast(Any, cell.precision)),
    )


class _Record(Callback):
    """Keeps what an Outcome has."""

    def __init__(self) -> None:
        self.outcome = Outcome([], [], {})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        module = cast(RWKVModule, pl_module)
        if trainer.global_step > len(self.outcome.losses):
            assert module.verdict.loss is not None
            self.outcome.losses.append(float(module.verdict.loss))
            self.outcome.norms.append(float(module.grad_norm))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for shard in cast(ShardedStrategy, trainer.strategy).shards(moments=False):
            if shard.owned and shard.kind == WEIGHT and shard.values.numel():
                part = (shard.start, shard.values.detach().flatten().numpy().copy())
                self.outcome.weights.setdefault(shard.name, []).append(part)


def run(config: Config, rank_info: RankInfo | None = None) -> Outcome:
    """Trains as `train` does, without records and checkpoints."""
    setup = assemble(config, rank_info=rank_info)
    clock = TokenClock.resumed((), 0, config.batch.tokens)
    setup.data.begin(0, None)
    block = sum(math.prod(shape) for name, shape in setup.shapes.items() if name.startswith("blocks.0."))
    strategy = build_strategy(config, setup.resolved, block)
    strategy.attach(setup.shapes, setup.source, resume=None, attempt=1, threads=1, background=False)
    record = _Record()
    steps = total_steps(config, clock)
    module = build_module(setup, steps, clock)
    build_trainer(setup, steps, strategy, [record]).fit(module, datamodule=DataModule(setup.data))
    return record.outcome


def run_alone(cell: Cell, folder: Path) -> Outcome:
    threads = torch.get_num_threads()
    try:
        return run(config_of(cell, folder, ranks=1))
    finally:
        torch.set_num_threads(threads)


def run_in_turn(rank: int, ranks: int, configs: Sequence[Config]) -> list[Outcome]:
    """This rank's outcomes of several runs, one after the other in the process group that exists."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHELASTIC_RUN_ID="test")
    resolved.__dict__["cores"] = lambda: max(ranks, os.cpu_count() or 1)
    rank_info = RankInfo("torchrun", rank, rank, ranks)
    return [run(config, rank_info) for config in configs]


def complete(outcomes: Sequence[Outcome]) -> dict[str, Floats]:
    """The flattened weights, from the parts of all ranks; NaN where none has an element."""
    found: dict[str, Floats] = {}
    for name in dict.fromkeys(name for outcome in outcomes for name in outcome.weights):
        parts = [part for outcome in outcomes for part in outcome.weights.get(name, ())]
        found[name] = np.full(max(start + len(values) for start, values in parts), np.nan, np.float32)
        for start, values in parts:
            found[name][start : start + len(values)] = values
    return found
