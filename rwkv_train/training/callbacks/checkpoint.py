"""When a checkpoint is written and which are kept. How it is written is checkpoint/'s matter."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from rwkv_train.checkpoint.commit import stay
from rwkv_train.checkpoint.directory import (
    aside_of,
    attempt_of,
    counted,
    directory_name,
    newest,
    read_meta,
    step_of,
)
from rwkv_train.checkpoint.storage import LocalStorage, Storage
from rwkv_train.config import CheckpointSettings
from rwkv_train.data.batches import Batches
from rwkv_train.errors import UserError
from rwkv_train.rundir.attempts import Attempts
from rwkv_train.rundir.jsonl import Events
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.strategy import ShardedStrategy

_PROBE_TOLERANCE = {"32-true": 2e-6, "bf16-mixed": 1e-2}  # relative


class Superseded(Exception):
    """A newer start of this run has begun: what this one writes from now on would not count."""


class CheckpointCallback(Callback):
    """Saves between two steps: when a step is due, its validation done and the next one not yet begun.

    Args:
        directory: checkpoints/ of the run.
        settings: how often, and which stay.
        tokens_per_step: converts spans that are given in tokens.
        meta: what is known before training (config, versions), written into each checkpoint.
        events: gets a row for each checkpoint.
        storage: the file system.
        restoring: called with the step reached, before training waits for a restore.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointSettings,
        tokens_per_step: int,
        meta: dict[str, Any],
        events: Events,
        storage: Storage | None = None,
        restoring: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.directory, self.meta, self.events, self.keep, self.best = (
            directory,
            meta,
            events,
            settings.keep,
            settings.best,
        )
        self.every = settings.every.in_steps(tokens_per_step)
        self.permanent = None if settings.permanent is None else settings.permanent.in_steps(tokens_per_step)
        self.storage: Storage = storage or LocalStorage()
        self.attempts = Attempts(directory.parent)
        self._number = 0  # this attempt's
        self.failures = 0  # saves that the disk refused
        self.last: int | None = None  # step of the newest checkpoint
        self.takes: float | None = None  # seconds that the last one took
        self.at_end = True  # whether the end of the training is saved
        self._begun: int | None = None  # the same, of one that is perhaps still being written
        self._probe: float | None = None
        self._probe_at = 0  # the step of the data whose first sample it is
        self._pause = 0.0  # seconds that the last save has stopped the training
        self.paused = 0.0  # the same of all saves
        self.restoring = restoring
        self._went_back_to: int | None = None  # step of the checkpoint to which the run was rewound last

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy = cast(ShardedStrategy, trainer.strategy)
        self._number = strategy.attempt
        strategy.open_writer(self.storage, self._retain)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Recomputes the loaded checkpoint's probe: weights, data and engine give the loss that they gave before."""
        if self._probe is None:
            return
        now, before = self._measure_probe(trainer, self._probe_at), self._probe
        tolerance = _PROBE_TOLERANCE.get(str(trainer.precision), 1e-2)
        if not abs(now - before) <= tolerance * abs(before):
            raise UserError(
                f"resume: the loss of the next batch under the saved weights is {now!r}, at the save it was {before!r}",
                "the data, the engine or the weights are not those of the checkpoint; "
                "run.name=NEW init.weights=CHECKPOINT starts a new run from them",
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._report(cast(ShardedStrategy, trainer.strategy))
        if step and step % self.every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at_end:
            self.save(trainer)
        strategy = cast(ShardedStrategy, trainer.strategy)
        strategy.settle()
        self._report(strategy)

    def leave_out_the_end(self) -> None:
        """The end of the training is not saved: there is no time."""
        self.at_end = False

    def save(self, trainer: L.Trainer) -> None:
        """Begins a checkpoint of this step, unless there is one. A disk that refuses it costs no more than that.

        Raises:
            Superseded: a newer start of the run has taken over.
        """
        step = trainer.global_step
        if step == self._begun:
            return
        began, self._begun = time.perf_counter(), step
        if trainer.strategy.broadcast(trainer.is_global_zero and self.attempts.superseded(self._number)):
            raise Superseded
        self._probe_at = trainer.datamodule.batches.data_step(step)  # type: ignore[attr-defined]
        self._probe = self._measure_probe(trainer, self._probe_at)
        trainer.save_checkpoint(self.directory / directory_name(step, self._number))
        self._pause = time.perf_counter() - began
        self.paused += self._pause

    def go_back(self, trainer: L.Trainer, before: int) -> Path | None:
        """Restores the newest whole checkpoint before a step, and goes on as a new attempt. All ranks call it.

        The one that was restored last is passed over where there is an older one.

        Returns:
            which one; None: there is none.
        """
        self.restoring(trainer.global_step)
        strategy = cast(ShardedStrategy, trainer.strategy)
        strategy.settle()
        self._report(strategy)
        path: Path | None = None
        if strategy.global_rank == 0:
            path, _ = newest(self.directory, self.storage, before=before)
            if path is not None and step_of(path) == self._went_back_to:  # it did not help, perhaps it is bad itself
                older, _ = newest(self.directory, self.storage, before=step_of(path))
                path = older or path
        path = strategy.broadcast(path)
        if path is None:
            return None
        number = 0
        if strategy.global_rank == 0:
            number = self.attempts.claim()
            self.attempts.begin(number, step_of(path) or 0, attempt_of(path))
        self._number = strategy.begin_attempt(number)
        strategy.restore(path)
        self.last = self._begun = self._went_back_to = step_of(path)
        return path

    def _report(self, strategy: ShardedStrategy) -> None:
        """Tells how the saves ended that were under way."""
        for outcome in strategy.writer.finished():
            if outcome.error is not None:
                self._refused(outcome.path, outcome.error)
                continue
            self.last, self.takes = step_of(outcome.path), self._pause + outcome.seconds
            seconds = {"seconds": round(outcome.seconds, 3), "pause": round(self._pause, 3)}
            self.events.add("checkpoint", self.last or 0, **seconds)

    def _refused(self, path: Path, error: str) -> None:
        self.failures += 1
        if not self.events.enabled:
            return
        kept, _ = newest(self.directory, self.storage)
        with contextlib.suppress(OSError):  # then the next start removes it
            self.storage.delete(aside_of(path))
        print(
            f"\nWARNING: the checkpoint {path} could not be written: {error}\n"
            f"  training goes on; the last whole checkpoint is {kept or 'none'}",
            file=sys.stderr,
            flush=True,
        )
        self.events.add("checkpoint_failed", step_of(path) or 0, error=error)

    def _retain(self) -> None:
        """Deletes the checkpoints that need not stay; called in the writer's thread, behind a commit.

        Nothing, where a newer attempt has begun: it may have begun from one of them. One that begins only now finds
        the checkpoint that was just committed.
        """
        if self.attempts.superseded(self._number):
            return
        paths = {step_of(path) or 0: path for path in counted(self.directory, self.storage, self._number)}
        losses = {step: read_meta(path).get("val_loss") if self.best else None for step, path in paths.items()}
        for step in paths.keys() - stay(losses, self.keep, self.permanent, self.best):
            try:
                self.storage.delete(paths[step])
            except FileNotFoundError:  # an older attempt was about to delete the same one
                pass
            except OSError as error:
                print(f"warning: {paths[step]} cannot be deleted: {error.strerror}", file=sys.stderr)

    def _measure_probe(self, trainer: L.Trainer, data_step: int) -> float:
        """The loss of the first sample of a step of the data, the same one for any number of ranks; no update."""
        batches: Batches = trainer.datamodule.batches  # type: ignore[attr-defined]
        strategy = cast(ShardedStrategy, trainer.strategy)
        batch = strategy.batch_to_device(batches.first_sample(data_step))
        with trainer.precision_plugin.forward_context():
            loss = strategy.probe(batch)
        return float(strategy.reduce(loss, reduce_op="mean"))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, RWKVModule)
        step, loss = trainer.global_step, trainer.callback_metrics.get("val/loss")
        checkpoint["loops"] = between_steps(checkpoint["loops"], step, trainer.accumulate_grad_batches)
        checkpoint["meta"] = {
            **self.meta,
            "step": step,
            "tokens": pl_module.tokens_seen,
            "probe": self._probe,
            "data_step": self._probe_at,
            "skips": [list(skip) for skip in trainer.datamodule.batches.skips],  # type: ignore[attr-defined]
            "val_loss": None if loss is None else float(loss),
        }
        position = trainer.datamodule.batches.position(step)  # type: ignore[attr-defined]
        if position is not None:
            checkpoint["meta"]["position"] = position

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        meta = checkpoint["meta"]
        trainer.datamodule.batches.begin(meta["step"], meta.get("position"))  # type: ignore[attr-defined]
        self._probe, self.last, self._begun = meta["probe"], meta["step"], meta["step"]
        self._probe_at = meta.get("data_step", meta["step"])
        checkpoint["loops"] = between_steps(checkpoint["loops"], meta["step"], trainer.accumulate_grad_batches)


def between_steps(loops: dict[str, Any], step: int, accumulation: int) -> dict[str, Any]:
    """Lightning's counters, set to "step is done, with its validation, and the next has not begun".

    They are saved from inside hooks, where some count a batch as ready that is not trained yet; written like this,
    every checkpoint of a step is the same, whichever hook saved it.
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
