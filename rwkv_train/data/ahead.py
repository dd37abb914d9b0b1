"""Batches that are made ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from rwkv_train.data.batch import Batch

MAX_PINNED_BATCHES = 4  # that wait in pinned memory for a GPU


class Ahead:
    """Batches made ahead by a thread, in pinned memory, so that they reach a GPU while it computes.

    They end where those of `batches` end. An exception in the thread is raised where the next batch is asked for.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        waiting: queue.Queue[Batch | BaseException | None] = queue.Queue(MAX_PINNED_BATCHES)
        closed = threading.Event()

        def work() -> None:
            try:
                for batch in self.batches:
                    _put(waiting, batch.pin(), closed)
                    if closed.is_set():
                        return
                _put(waiting, None, closed)
            except BaseException as error:
                _put(waiting, error, closed)

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                batch = waiting.get()
                if batch is None:
                    return
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            closed.set()
            thread.join()


def _put(waiting: queue.Queue[Any], item: Any, closed: threading.Event) -> None:
    while not closed.is_set():
        try:
            waiting.put(item, timeout=0.1)
            return
        except queue.Full:
            continue
