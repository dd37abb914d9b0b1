"""When a checkpoint is written and which ones are kept; how one is written is in checkpoint/."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from rwkv_train.checkpoint.directory import newest, remove_unfinished
from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.retention import Retention
from rwkv_train.checkpoint.storage import LocalStorage, Storage
from rwkv_train.config import CheckpointSettings
from rwkv_train.data.batch import Batch
from rwkv_train.data.batches import Batches
from rwkv_train.rundir.attempts import Attempts, Superseded
from rwkv_train.rundir.jsonl import Events
from rwkv_train.training.attempt import continue_data
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.probe import CANDIDATES, Probe
from rwkv_train.training.strategy import ShardedStrategy


class CheckpointCallback(Callback):
    """Saves between two steps: when one is due, after the validation of the last step and before the next one.

    Where the best checkpoint is kept, one is due after each validation.

    Args:
        directory: checkpoints/ of the run.
        settings: how often to save, and which checkpoints to keep.
        tokens_per_step: converts durations that are given in tokens.
        data: the batches of the run, whose position is saved.
        meta: the fields of CheckpointMeta that are known before training: config, data, tokenizer, versions.
        events: gets an event for each checkpoint.
        storage: the file system.
        waiting: called with the step reached, before training waits for a save or a restore.
        same_data: whether a resume must find the probe's sample in the data again.

    Attributes:
        failures: number of saves that the disk refused.
        last: step of the newest checkpoint; None: there is none.
        takes: seconds that the last save took, from its start to the commit; None: not known yet.
        at_end: whether the last step is saved when training ends.
        paused: seconds for which saves have paused training so far.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointSettings,
        tokens_per_step: int,
        data: Batches,
        meta: dict[str, Any],
        events: Events,
        storage: Storage | None = None,
        waiting: Callable[[int], None] = lambda step: None,
        same_data: bool = True,
    ) -> None:
        self.directory, self.data, self.meta, self.events = directory, data, meta, events
        self.every = settings.every.in_steps(tokens_per_step)
        self.storage: Storage = storage or LocalStorage()
        self.attempts = Attempts(directory.parent)
        self.retention = Retention.of(directory, self.attempts, settings, self.storage)
        self.failures = 0
        self.last: int | None = None
        self.takes: float | None = None
        self.at_end = True
        self.paused = 0.0
        self.waiting, self.same_data = waiting, same_data
        self._attempt = 0  # number of this attempt
        self._begun: int | None = None  # step of the newest save, which may not have ended yet
        self._probe: Probe | None = None
        self._pause = 0.0  # seconds for which the last save has paused training
        self._restored: int | None = None  # step of the checkpoint to which the run was rewound last

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy = cast(ShardedStrategy, trainer.strategy)
        self._attempt = strategy.attempt
        strategy.open_writer(self.storage, self._retain)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Recomputes the probe of the loaded checkpoint: weights and engine must give the loss of the save.

        Raises:
            UserError: they give another one.
        """
        if self._probe is not None:
            self._probe.check(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._report(cast(ShardedStrategy, trainer.strategy))
        assert isinstance(pl_module, RWKVModule)
        validated = pl_module.validated is not None and pl_module.validated.step == step
        if step and (step % self.every == 0 or (self.retention.best and validated)):
            self.save(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.data.trained(batch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at_end:
            self.save(trainer)
        self.waiting(trainer.global_step)
        strategy = cast(ShardedStrategy, trainer.strategy)
        strategy.settle()
        self._report(strategy)

    def skip_last_save(self) -> None:
        """The last step is not saved when training ends: there is no time."""
        self.at_end = False

    def save(self, trainer: L.Trainer) -> None:
        """Starts a save of this step, unless there was one already. If the disk refuses it, training continues.

        Weights under which no sample of the probe has a finite loss are not saved: nothing could resume from them.

        Raises:
            Superseded: a newer attempt of the run has taken over.
        """
        step = trainer.global_step
        if step == self._begun:
            return
        began, self._begun = time.perf_counter(), step
        if trainer.strategy.broadcast(trainer.is_global_zero and self.attempts.superseded(self._attempt)):
            raise Superseded
        self._probe = Probe.measure(trainer, self.data, step)
        if self._probe.loss is None:
            self._report_no_finite_loss(step)
            return
        trainer.save_checkpoint(self.directory / str(CheckpointName(step, self._attempt)))
        self._pause = time.perf_counter() - began
        self.paused += self._pause

    def go_back(self, trainer: L.Trainer, before: int, since: int = 0) -> Path | None:
        """Restores the newest complete checkpoint before a step, and continues as a new attempt; a collective call.

        The checkpoint that was restored last is skipped if there is an older one.

        Args:
            trainer: whose state is replaced.
            before: a step; the checkpoint is of an earlier one.
            since: the step of the oldest checkpoint that counts.

        Returns:
            the checkpoint's directory; None: there is none.

        Raises:
            Superseded: a newer attempt of the run has taken over.
        """
        self.waiting(trainer.global_step)
        strategy = cast(ShardedStrategy, trainer.strategy)
        strategy.settle()
        self._report(strategy)
        path: Path | None = None
        if strategy.global_rank == 0:
            path, _ = newest(self.directory, self.storage, before=before)
            if path is not None and CheckpointName.of(path).step == self._restored:  # perhaps it is bad itself
                older, _ = newest(self.directory, self.storage, before=self._restored)
                path = path if older is None or CheckpointName.of(older).step < since else older
            if path is not None and CheckpointName.of(path).step < since:
                path = None
        path = strategy.broadcast(path)
        if path is None:
            return None
        name, number = CheckpointName.of(path), 0
        if strategy.global_rank == 0:
            with suppress(Superseded):
                number = self.attempts.claim(after=self._attempt)
                self.attempts.begin(number, name.step, name.attempt)
        if strategy.broadcast(strategy.global_rank == 0 and not number):
            raise Superseded
        self._attempt = strategy.begin_attempt(number)
        strategy.restore(path)
        self.last = self._begun = self._restored = name.step
        return path

    def _report(self, strategy: ShardedStrategy) -> None:
        """Records how the saves that have ended meanwhile ended."""
        for outcome in strategy.writer.finished():
            if outcome.error is not None:
                self._report_failure(outcome.path, outcome.error)
                continue
            self.last, self.takes = CheckpointName.of(outcome.path).step, self._pause + outcome.seconds
            seconds = {"seconds": round(outcome.seconds, 3), "pause": round(self._pause, 3)}
            self.events.add("checkpoint", self.last, **seconds)
            if outcome.trouble is not None and self.events.enabled:
                print(
                    f"\nWARNING: {outcome.path} is complete, but then: {outcome.trouble}", file=sys.stderr, flush=True
                )

    def _report_no_finite_loss(self, step: int) -> None:
        if not self.events.enabled:
            return
        error = f"the loss of none of the next {CANDIDATES} samples is finite"
        last = "there is none yet" if self.last is None else f"the last one is of step {self.last}"
        print(f"\nWARNING: no checkpoint of step {step}: {error}; {last}", file=sys.stderr, flush=True)
        self.events.add("checkpoint_failed", step, error=error)

    def _report_failure(self, path: Path, error: str) -> None:
        self.failures += 1
        if not self.events.enabled:
            return
        kept, _ = newest(self.directory, self.storage, content=False)  # other ranks wait while this one would hash
        print(
            f"\nWARNING: the checkpoint {path} could not be written: {error}\n"
            f"  training continues; the last complete checkpoint is {kept or 'none'}",
            file=sys.stderr,
            flush=True,
        )
        self.events.add("checkpoint_failed", CheckpointName.of(path).step, error=error)

    def _retain(self) -> None:
        """Deletes the checkpoints that are not to be kept; called in the writer's thread after each commit.

        If a newer attempt has begun, nothing is deleted: it may have started from one of them. An attempt that begins
        only now finds the checkpoint that was just committed.
        """
        if self.attempts.superseded(self._attempt):
            return
        for path in self.retention.superfluous(self._attempt):
            try:
                self.storage.delete(path)
            except FileNotFoundError:  # an older attempt has deleted the same one
                pass
            except OSError as error:
                print(f"\nWARNING: {path} cannot be deleted: {error.strerror or error}", file=sys.stderr)
        remove_unfinished(self.directory, self._attempt, self.storage)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, RWKVModule)
        assert self._probe is not None
        strategy, step, validated = pl_module.strategy, trainer.global_step, pl_module.validated
        checkpoint["loops"] = between_steps(checkpoint["loops"], step, trainer.accumulate_grad_batches)
        checkpoint["meta"] = CheckpointMeta(
            step=step,
            tokens=pl_module.tokens_seen,
            updates=strategy.updates(),
            probe=self._probe.loss,
            probe_sample=self._probe.sample,
            batches=pl_module.clock.batches,
            data_tokens=self.data.course.end(step) * self.data.context,
            tokens_by_source=self.data.tokens_by_source(step),
            position=self.data.position(),
            val_loss=None if validated is None else validated.loss_of(step),
            shapes=strategy.shapes,
            writers=strategy.writer.writers,
            **self.meta,
        )
        checkpoint["probe"] = self._probe.as_state()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        meta: CheckpointMeta = checkpoint["meta"]
        continue_data(self.data, meta, self.data.course.skips)  # rank 0 may have chosen another checkpoint
        self._probe = Probe.load(meta, checkpoint["probe"])
        if self.same_data:
            self._probe.compare(self.data)
        self.last = self._begun = meta.step
        checkpoint["loops"] = between_steps(checkpoint["loops"], meta.step, trainer.accumulate_grad_batches)


def between_steps(loops: dict[str, Any], step: int, accumulation: int) -> dict[str, Any]:
    """Lightning's counters, set to the state between two steps: `step` is done and validated, the next has not begun.

    They are saved from inside hooks, where some of them count a batch as ready that is not trained yet. Set like this,
    every checkpoint of a step is the same, whichever hook saved it.

    Args:
        loops: state of Lightning's loops.
        step: optimiser steps done.
        accumulation: micro-batches per step.
    """
    fit = loops["fit_loop"]
    batches = step * accumulation
    for span in ("total", "current"):
        fit["epoch_progress"][span].update(ready=1, started=1, processed=0, completed=0)
        fit["epoch_loop.batch_progress"][span].update(
            ready=batches, started=batches, processed=batches, completed=batches
        )
        optimizer = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        optimizer["step"][span].update(ready=step, completed=step)
        optimizer["zero_grad"][span].update(ready=step, started=step, completed=step)
    fit["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    return {"fit_loop": fit}
