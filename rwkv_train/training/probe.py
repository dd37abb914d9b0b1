"""The probe of a checkpoint: the loss of one sample under the saved weights, recomputed after they were loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import numpy as np
import torch

from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.data.batch import Batch
from rwkv_train.data.batches import Batches
from rwkv_train.data.rows import IGNORED_TARGET
from rwkv_train.data.stream import PROBE_SAMPLES
from rwkv_train.errors import UserError
from rwkv_train.training.strategy import ShardedStrategy

CANDIDATES = PROBE_SAMPLES  # samples that are tried until one has a finite loss
_TOLERANCE = {"32-true": 2e-6, "bf16-mixed": 1e-2}  # relative
_REMEDY = "run.name=NEW init.weights=CHECKPOINT starts a new run from its weights"


@dataclass(frozen=True)
class Probe:
    """A sample and its loss.

    Attributes:
        sample: its number in the order of the data.
        batch: the sample itself, (1, T); a resume with other data measures it all the same.
        loss: under the saved weights, in nats per token; None: that of no candidate is finite, and they are not saved.
    """

    sample: int
    batch: Batch
    loss: float | None

    def as_state(self) -> dict[str, Any]:
        """What a checkpoint's state file holds of it: tensors only."""
        batch = self.batch
        return {"tokens": batch.tokens, "targets": batch.targets, "starts": batch.starts, "mean": batch.predictions}

    @classmethod
    def load(cls, meta: CheckpointMeta, state: dict[str, Any]) -> Probe:
        """Reads the probe of a checkpoint from its meta and from what `as_state` gave."""
        zero = np.zeros(1, np.int64)
        batch = Batch(state["tokens"], state["targets"], zero, zero, state["starts"], state["mean"])
        return cls(meta.probe_sample, batch, meta.probe)

    @classmethod
    def measure(cls, trainer: L.Trainer, data: Batches, step: int) -> Probe:
        """Measures the first sample of a step, or the next one whose loss is finite; a collective call.

        A single sample may have a loss that is not finite under good weights: such steps are skipped, not fatal.
        """
        numbers = data.probe_samples(step, CANDIDATES)
        for number in numbers:
            batch = data.lone_sample(number)
            if bool((batch.targets != IGNORED_TARGET).any()):
                loss = _loss(trainer, batch)
                if math.isfinite(loss):
                    return cls(number, batch, loss)
        return cls(numbers[0], data.lone_sample(numbers[0]), None)

    def compare(self, data: Batches) -> None:
        """Compares the sample with that of the data, from which no batch of the resumed run was asked for yet.

        Raises:
            UserError: the data has another sample under this number.
        """
        again = data.lone_sample(self.sample)
        if not (torch.equal(again.tokens, self.batch.tokens) and torch.equal(again.targets, self.batch.targets)):
            raise UserError(f"resume: sample {self.sample:,} of the data is not what it was at the save", _REMEDY)

    def check(self, trainer: L.Trainer) -> None:
        """Compares the loss with what the loaded weights give; a collective call.

        Raises:
            UserError: the loss is another one.
        """
        assert self.loss is not None, "no run resumes from such a checkpoint"
        now = _loss(trainer, self.batch)
        if not abs(now - self.loss) <= _TOLERANCE.get(str(trainer.precision), 1e-2) * abs(self.loss):
            raise UserError(
                f"resume: the loss of the probe sample under the saved weights is {now!r}, at the save it was "
                f"{self.loss!r}",
                f"the engine or the weights are not those of the checkpoint; {_REMEDY}",
            )


def _loss(trainer: L.Trainer, batch: Batch) -> float:
    """The loss without an update, the same for any number of ranks."""
    strategy = cast(ShardedStrategy, trainer.strategy)
    with trainer.precision_plugin.forward_context():
        loss = strategy.probe(strategy.batch_to_device(batch))
    return float(strategy.reduce(loss, reduce_op="mean"))
