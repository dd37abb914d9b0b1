"""When a checkpoint is written and which are kept. How it is written is training/checkpoint.py's matter."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from rwkv_train.errors import UserError
from rwkv_train.training.checkpoint import LocalStorage, Storage, directory_name, newest, step_of
from rwkv_train.training.loss import language_model_loss
from rwkv_train.training.module import RWKVModule, documents_of
from rwkv_train.training.records import Events

_PROBE_TOLERANCE = {"32-true": 2e-6, "bf16-mixed": 1e-2}  # relative


class Checkpointing(Callback):
    """Saves between two steps: when a step is due, its validation done and the next one not yet begun.

    Args:
        directory: checkpoints/ of the run.
        every: steps between two checkpoints.
        keep: how many of the newest ones stay.
        meta: what is known before training (config, versions), written into each checkpoint.
        events: gets a row for each checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        every: int,
        keep: int,
        meta: dict[str, Any],
        events: Events,
        storage: Storage | None = None,
    ) -> None:
        self.directory, self.every, self.keep, self.meta, self.events = directory, every, keep, meta, events
        self.storage: Storage = storage or LocalStorage()
        self.failures = 0  # saves that the disk refused
        self.last: int | None = None  # step of the newest checkpoint
        self._probe: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Recomputes the loaded checkpoint's probe: weights, data and engine give the loss that they gave before."""
        if self._probe is None:
            return
        now, before = self._measure_probe(trainer, pl_module), self._probe
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
        if batch_idx % trainer.accumulate_grad_batches == 0 and step and step % self.every == 0:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes a checkpoint of this step, unless there is one. A disk that refuses it costs no more than that."""
        step, began = trainer.global_step, time.perf_counter()
        if step == self.last:
            return
        path = self.directory / directory_name(step)
        self._probe = self._measure_probe(trainer, pl_module)
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            self._refused(path, error)
            trainer.strategy.barrier()  # the one inside save_checkpoint, at which the other ranks wait
            return
        self.last = step
        self.events.add("checkpoint", step, seconds=round(time.perf_counter() - began, 3))
        if trainer.is_global_zero:
            self._retain()

    def _refused(self, path: Path, error: OSError) -> None:
        self.failures += 1
        kept, _ = newest(self.directory, self.storage)
        with contextlib.suppress(OSError):  # then the next start removes it
            self.storage.delete(path.with_name(f".writing-{path.name}"))
        print(
            f"\nWARNING: the checkpoint {path} could not be written: {error.strerror or error}\n"
            f"  training goes on; the last whole checkpoint is {kept or 'none'}",
            file=sys.stderr,
            flush=True,
        )
        self.events.add("checkpoint_failed", step_of(path) or 0, error=str(error))

    def _retain(self) -> None:
        steps = [name for name in self.storage.names(self.directory) if step_of(Path(name)) is not None]
        for name in steps[: -self.keep]:
            try:
                self.storage.delete(self.directory / name)
            except OSError as error:
                print(f"warning: {self.directory / name} cannot be deleted: {error.strerror}", file=sys.stderr)

    def _measure_probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float:
        """The loss of this rank's first micro-batch of the next step, mean over the ranks, without an update."""
        assert isinstance(pl_module, RWKVModule)
        batch = trainer.datamodule.batches.batch(trainer.global_step)  # type: ignore[attr-defined]
        tokens, targets, starts, predictions = documents_of(trainer.strategy.batch_to_device(batch))
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            logits, _ = pl_module.model(tokens, starts=starts)
            loss = language_model_loss(logits, targets, 0.0, predictions)
        return float(trainer.strategy.reduce(loss, reduce_op="mean"))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, RWKVModule)
        step = trainer.global_step
        checkpoint["loops"] = between_steps(checkpoint["loops"], step, trainer.accumulate_grad_batches)
        checkpoint["meta"] = {**self.meta, "step": step, "tokens": pl_module.tokens_seen, "probe": self._probe}
        position = trainer.datamodule.batches.position(step)  # type: ignore[attr-defined]
        if position is not None:
            checkpoint["meta"]["position"] = position

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._probe, self.last = checkpoint["meta"]["probe"], checkpoint["meta"]["step"]


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
