"""The order of the micro-batches of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rwkv_train.data.batch import Batch

if TYPE_CHECKING:
    from rwkv_train.data.batches import Batches

ORDERED_AT_ONCE = 8192  # samples whose order is computed in one call


class TrainBatches:
    """The micro-batches in order; each iteration begins at `start_step` of the data.

    It ends before the first step that is not trained: Lightning asks for a batch before it needs it.
    """

    def __init__(self, data: Batches) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        data, step = self.data, self.data.start_step
        at_once = max(1, ORDERED_AT_ONCE // data.split.samples)  # to order a single batch takes longer than to read it
        while steps := data.steps_left(step, at_once):
            sources, offsets = (each.reshape(steps, -1) for each in data.offsets(step, steps))
            for number in range(steps):
                for index in range(data.accumulation):
                    yield data.assemble(step + number, sources[number], offsets[number], index)
            step += steps
