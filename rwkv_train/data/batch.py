"""What a micro-batch is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rwkv_train.data.arrays import Ints
from rwkv_train.data.rows import BatchArrays

if TYPE_CHECKING:
    from rwkv_train.data.stream import StreamPosition


class Batch(NamedTuple):
    """A micro-batch of one rank. Lightning moves its tensors to the device; the arrays stay on the host.

    Args:
        tokens: (B, T) int64.
        targets: (B, T) int64, IGNORED_TARGET where nothing is predicted.
        samples: (B) int64, which of the step's samples these are, counted from 0 over all ranks and micro-batches; of
            held-out text, the numbers of its rows.
        sources: (B) int64, which source each sample is from.
        starts: (B, T) bool, where a document begins that must not depend on those before it; None: nowhere.
        predictions: () float32, the predicted tokens of the complete step per rank and micro-batch: the sum of the
            losses is divided by it. None: every target is predicted, the loss is their mean.
        after: where a stream continues after this batch, the last one of its step; None: it is not the last, or its
            data is no stream.
    """

    tokens: Tensor
    targets: Tensor
    samples: Ints
    sources: Ints
    starts: Tensor | None = None
    predictions: Tensor | None = None
    after: StreamPosition | None = None

    @classmethod
    def of(
        cls,
        block: BatchArrays,
        samples: Ints,
        sources: Ints,
        predictions: float | None = None,
        after: StreamPosition | None = None,
    ) -> Batch:
        """The batch of these arrays, which it shares."""
        return cls(
            torch.from_numpy(block.tokens),
            torch.from_numpy(block.targets),
            samples,
            sources,
            None if block.starts is None else torch.from_numpy(block.starts),
            None if predictions is None else torch.tensor(predictions),
            after,
        )

    def pin(self) -> Batch:
        """The same in pinned memory, from which a GPU can copy while it computes."""
        return Batch._make(part.pin_memory() if isinstance(part, Tensor) else part for part in self)
