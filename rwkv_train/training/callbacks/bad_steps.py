"""What follows a bad step: its update is left out, and if that does not help the run is rewound or stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.text import Text
from torch import Tensor

from rwkv_train.checkpoint.directory import newest, read_meta
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.shards import Reader
from rwkv_train.config import HealthSettings
from rwkv_train.console import ERROR_STYLE
from rwkv_train.data.arrays import Ints
from rwkv_train.data.batch import Batch
from rwkv_train.data.batches import Batches
from rwkv_train.errors import UserError
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.rundir.durable import write_state
from rwkv_train.rundir.jsonl import Events, MetricsRow, WriteErrors
from rwkv_train.training.attempt import continue_data
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback, between_steps
from rwkv_train.training.callbacks.metrics import Metrics
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.step_verdict import Window
from rwkv_train.training.strategy.shared import GradientNorms

STEPS_PER_LIMIT = 10  # the limit for spikes is computed again after so many steps
MAX_PRINTED_SAMPLES = 4
MAX_PRINTED_CHARACTERS = 120  # of each sample
MAX_REPLAY_SAMPLES = 64  # in a replay file
MAX_REPLAY_CHECKPOINTS = 3  # kept for replays; older ones are deleted


@dataclass
class _Evidence:
    """What is kept of a step until its verdict is on the host.

    Args:
        limit: a larger loss is a spike.
        finite: see `StepVerdict`, an element for each micro-batch.
        samples: `Batch.samples` of each micro-batch.
        gradient_norms: None: the strategy does not know them.
    """

    limit: float
    finite: list[Tensor]
    samples: list[Ints]
    gradient_norms: GradientNorms | None


@dataclass
class _Bad:
    """What is known of a bad step.

    Args:
        kind: "nonfinite" or "spike".
        tensor: the first one that is bad, for messages.
        layer: its block; None: in none.
        samples: `Batches.sample` of the bad ones.
    """

    kind: str
    tensor: str
    layer: int | None
    samples: list[dict[str, Any]]


class BadSteps(Callback):
    """Reads each row when it is written, at the same step on all ranks, and acts before the next step begins.

    The update of a bad step is left out on the device (`StepVerdict`), without waiting for the host. Whether the run is
    rewound or stopped is decided here, from numbers that are the same on all ranks.

    Args:
        settings: what counts as bad, and what follows.
        metrics: its rows are read.
        saving: restores checkpoints.
        data: of the run.
        run: where replay files and the skipped data are recorded.
        tree: the resolved config, for replay files.
        events, write_errors: of the run.
        console: where alerts are printed.
        rewinds: how often the run was rewound before this start.
    """

    def __init__(
        self,
        settings: HealthSettings,
        metrics: Metrics,
        saving: CheckpointCallback,
        data: Batches,
        run: RunDirectory,
        tree: dict[str, Any],
        events: Events,
        write_errors: WriteErrors,
        console: Console,
        rewinds: int = 0,
    ) -> None:
        self.settings, self.metrics, self.saving, self.data, self.run = settings, metrics, saving, data, run
        self.tree, self.events, self.write_errors, self.console = tree, events, write_errors, console
        self.stopped: str | None = None  # why the run was stopped
        self.rewinds = rewinds
        self.window = Window(settings.window, settings.z)
        self._evidence: dict[int, _Evidence] = {}  # by step
        self._samples_so_far: list[Ints] = []  # of the current step's micro-batches
        self._streak = 0  # bad steps in a row
        self._first_bad = 0  # of them
        self._high = False  # whether the step before was a spike that is only reported
        self._action: str | None = None  # "rewind" or "stop", before the next step
        self._limit = math.inf
        self._module: RWKVModule | None = None
        metrics.listeners.append(self._see)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, RWKVModule)
        self._module = pl_module

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, RWKVModule)
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._samples_so_far = []
        action, self._action = self._action, None
        if action is not None:
            reason = self._rewind(trainer, pl_module) if action == "rewind" else "a bad step, and the policy is to stop"
            if reason is not None:
                self.stopped = reason
                trainer.should_stop = True
                pl_module.read_again()
        if trainer.global_step % STEPS_PER_LIMIT == 0:
            self._limit = self.window.limit()
        if self.settings.spike != "alert":
            pl_module.verdict.set_limit(self._limit)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, RWKVModule)
        self._samples_so_far.append(batch.samples)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            norms, samples = pl_module.strategy.gradient_norms, self._samples_so_far
            self._evidence[trainer.global_step] = _Evidence(self._limit, pl_module.verdict.finite, samples, norms)

    def _see(self, row: MetricsRow) -> None:
        """Reads the row of a step; called on all ranks, which see the same numbers."""
        step, loss = row["step"], row["train/loss"]
        evidence = self._evidence.pop(step, None)
        self.window.add(loss)
        finite = loss is not None and row["grad_norm"] is not None
        if evidence is None or (finite and loss <= evidence.limit):
            self._streak, self._high = 0, False
            return
        policy = self.settings.spike if finite else self.settings.nonfinite
        if policy == "alert":
            if not self._high:  # a loss that stays high is reported once
                self._report(row, self._examine(step - 1, evidence, finite), "the step counts as any other", None)
            self._high = True
            return
        bad = self._examine(step - 1, evidence, finite)
        self._streak += 1
        if self._streak == 1:
            self._first_bad = step
        if policy == "skip" and self._streak >= self.settings.patience:
            policy = "rewind"
        self._action = None if policy == "skip" else policy
        replay = self._write_replay(step, row, bad) if self._streak == 1 else None
        self._report(row, bad, {"skip": "its update was left out", "stop": "the run stops"}.get(policy, policy), replay)

    def _examine(self, step: int, evidence: _Evidence, finite: bool) -> _Bad:
        """Finds the first bad tensor of a step (0 for the first), and the samples it is of; all ranks call it."""
        assert self._module is not None
        if finite:
            return _Bad("spike", "the loss", None, self._samples(step, None))
        bad = [
            (layer, part, int(samples[row]))
            for finite, samples in zip(evidence.finite, evidence.samples, strict=True)
            for part, layer, row in _where(~finite)
        ]
        norms = evidence.gradient_norms
        gradients = None if norms is None else [index for (index,) in _where(~norms.values.isfinite())]
        ranks: list[Any] = [(bad, gradients)]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, (bad, gradients))
        first = min((each[:2] for bad, _ in ranks for each in bad), default=None)
        if first is not None:
            numbers = {number for bad, _ in ranks for _, _, number in bad}
            tensor = f"blocks.{first[0]}: {self._module.model.architecture.state_parts[first[1]]}"
            return _Bad("nonfinite", tensor, first[0], self._samples(step, numbers))
        # of each rank the last one in the model's order: a backward pass begins at the end
        where = {rank: indices[-1] for rank, (_, indices) in enumerate(ranks) if indices}
        if not where:
            what = "the gradient or the loss" if norms is None else "the loss"
            return _Bad("nonfinite", what, None, self._samples(step, None))
        assert norms is not None
        name = norms.names[max(where.values())]
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        some = "" if len(where) == len(ranks) else f" on rank {', '.join(map(str, where))}"
        return _Bad("nonfinite", f"gradient of {name}{some}", layer, self._samples(step, None))

    def _samples(self, step: int, numbers: Collection[int] | None) -> list[dict[str, Any]]:
        """The samples of a step with these numbers, or all."""
        if not self.events.enabled:
            return []
        chosen = sorted(numbers if numbers is not None else range(self.data.split.samples))
        return [self.data.sample(step, number) for number in chosen[:MAX_REPLAY_SAMPLES]]

    def _write_replay(self, step: int, row: MetricsRow, bad: _Bad) -> Path | None:
        """Writes the file for `replay=`, and keeps the checkpoint before the step next to it."""
        if not self.events.enabled:
            return None
        folder = self.run.path / "replay"
        file = folder / f"step_{step:09d}.json"
        with self.write_errors.tolerate(file):
            folder.mkdir(exist_ok=True)
            checkpoint, _ = newest(self.saving.directory, self.saving.storage, content=False, before=step)
            if checkpoint is not None:
                checkpoint = _kept(checkpoint, folder / checkpoint.name)
                for old in _superfluous(folder, checkpoint):
                    shutil.rmtree(old)
            content = {
                "step": step,
                "kind": bad.kind,
                "tensor": bad.tensor,
                "layer": bad.layer,
                "loss": row["train/loss"],
                "grad_norm": row["grad_norm"],
                "checkpoint": None if checkpoint is None else str(checkpoint.absolute()),
                "skipped": self.data.skipped,
                "samples": bad.samples,
                "config": self.tree,
            }
            file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        return file

    def _report(self, row: MetricsRow, bad: _Bad, action: str, replay: Path | None) -> None:
        if not self.events.enabled:
            return
        step, what = row["step"], "is a spike" if bad.kind == "spike" else "is not finite"
        known = {"kind": bad.kind, "tensor": bad.tensor, "layer": bad.layer, "action": action}
        numbers = [sample["number"] for sample in bad.samples]
        self.events.add("bad_step", step, **known, samples=numbers, replay=None if replay is None else str(replay))
        text = f"{bad.tensor} {what}" + ("" if bad.kind == "nonfinite" else f": {row['train/loss']:.4f}")
        if len(numbers) < self.data.split.samples:
            for sample in bad.samples[:MAX_PRINTED_SAMPLES]:
                start = sample["text"][:MAX_PRINTED_CHARACTERS]
                text += f"\n  sample {sample['number']} of the step, {sample['source']} at {sample['place']}: {start!r}"
        self._print(
            step, f"{text}\n  {action}" + ("" if replay is None else f"; `python train.py replay={replay}` repeats it")
        )

    def _print(self, step: int, text: str) -> None:
        self.console.print(Text.assemble(("ALERT", ERROR_STYLE), f" step {step}: {text}"))

    def _rewind(self, trainer: L.Trainer, module: RWKVModule) -> str | None:
        """Rewinds to the checkpoint before the first bad step and skips the data read since; else returns why not."""
        if self.rewinds >= self.settings.rewinds:
            return f"health.rewinds={self.settings.rewinds} are used up"
        reached = trainer.global_step
        self.metrics.write()
        checkpoint = self.saving.go_back(trainer, self._first_bad, since=module.clock.changed)
        if checkpoint is None:
            return "there is no checkpoint to go back to"
        meta = read_meta(checkpoint)
        step = meta.step
        first, unread = -(-meta.data_tokens // self.data.context), self.data.course.end(reached)
        skips = [*(skip for skip in self.data.course.skips if skip[0] < first), (first, unread)]
        passed_over = -(-(unread - first) // self.data.split.samples)  # steps
        self.rewinds += 1
        continue_data(self.data, meta, skips)
        for record in (self.metrics.lines, self.events):
            record.follow_attempt(self.run.attempts.directory(module.strategy.attempt) / record.path.name)
        self.metrics.forget(step)
        _count_from(trainer, step)
        self._restore(Reader(checkpoint).state(0)["lightning"])
        self._evidence.clear()
        module.verdict.count_skipped_from(step - meta.updates)
        module.read_again()
        if self.events.enabled:
            left_out = {"rewinds": self.rewinds, "skipped": self.data.skipped}
            with self.write_errors.tolerate(self.run.passed_over):
                write_state(self.run.passed_over, left_out)
            self.events.add("rewound", step, reached=reached, passed_over=passed_over, **left_out)
            self._print(
                reached,
                f"rewound to {checkpoint.name}; the data of {passed_over} steps are passed over",
            )
        try:
            self.data.refuse_budget(module.total_steps)
        except UserError as error:
            return f"the data does not last: {error}"
        return None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        streak = {"streak": self._streak, "first_bad": self._first_bad, "todo": self._action}
        checkpoint["health"] = {"losses": list(self.window.losses), "limit": self._limit, **streak}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, RWKVModule)
        meta = checkpoint["meta"]
        pl_module.verdict.count_skipped_from(meta.step - meta.updates)
        self._restore(checkpoint)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        held = checkpoint.get("health", {})
        self.window = Window(self.settings.window, self.settings.z, held.get("losses"))
        self._streak, self._first_bad = held.get("streak", 0), held.get("first_bad", 0)
        self._action, self._limit = held.get("todo"), held.get("limit", math.inf)


def _where(flags: Tensor) -> list[list[int]]:
    """The indices of the true elements; waits for the device: only where a step was bad."""
    found: list[list[int]] = flags.nonzero().tolist()
    return found


def _kept(checkpoint: Path, copy: Path) -> Path:
    """Hard links to a checkpoint's files, so that they remain when the checkpoint is deleted."""
    copy.mkdir(exist_ok=True)
    try:
        for file in checkpoint.iterdir():
            if not (copy / file.name).exists():
                os.link(file, copy / file.name)
    except OSError:  # a file system without hard links: checkpoint.keep decides how long it remains
        shutil.rmtree(copy)
        return checkpoint
    return copy


def _superfluous(folder: Path, newest: Path) -> list[Path]:
    """The checkpoints of a folder that are not kept for replays: by their names, since clocks may step back."""
    others = [path for path in folder.iterdir() if CheckpointName.parse(path.name) and path.name != newest.name]
    others.sort(key=lambda path: (CheckpointName.of(path).attempt, CheckpointName.of(path).step))
    return others[: max(0, len(others) - MAX_REPLAY_CHECKPOINTS + 1)]


def _count_from(trainer: L.Trainer, step: int) -> None:
    """Sets Lightning's counters to the state between this step and the next."""
    loop = trainer.fit_loop.epoch_loop
    counted = between_steps({"fit_loop": trainer.fit_loop.state_dict()}, step, trainer.accumulate_grad_batches)[
        "fit_loop"
    ]
    loop.batch_progress.load_state_dict(counted["epoch_loop.batch_progress"])
    progress = loop.automatic_optimization.optim_progress
    progress.load_state_dict(counted["epoch_loop.automatic_optimization.optim_progress"])
    loop._batches_that_stepped = step
