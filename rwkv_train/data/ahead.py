"""What a batch is, and batches made ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

PINNED = 4  # batches that wait in pinned memory for a GPU


class MaskedBatch(NamedTuple):
    """A batch of documents: some targets are no prediction."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORED where nothing is predicted
    starts: Tensor | None  # (B, T) bool, where a document begins that knows nothing of those before it
    predictions: Tensor  # () float32: of this step, per pass and device; the sum of the losses is divided by it


Batch = tuple[Tensor, Tensor] | MaskedBatch  # tokens and targets, each (B, T) int64


class Ahead:
    """Batches made ahead by a thread, in pinned memory, so that they reach a GPU while it computes."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        waiting: queue.Queue[Batch | BaseException] = queue.Queue(PINNED)
        over = threading.Event()

        def work() -> None:
            try:
                for batch in self.batches:
                    _put(waiting, _pin(batch), over)
                    if over.is_set():
                        return
            except BaseException as error:  # told where the batch is asked for
                _put(waiting, error, over)

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                batch = waiting.get()
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            over.set()
            thread.join()


def _put(waiting: queue.Queue[Any], item: Any, over: threading.Event) -> None:
    while not over.is_set():
        try:
            waiting.put(item, timeout=0.1)
            return
        except queue.Full:
            continue


def _pin(batch: Batch) -> Batch:
    pinned = [None if tensor is None else tensor.pin_memory() for tensor in batch]
    return MaskedBatch(*pinned) if isinstance(batch, MaskedBatch) else (pinned[0], pinned[1])  # type: ignore[arg-type, return-value]
