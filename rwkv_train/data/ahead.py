"""Batches that are made ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from rwkv_train.data.batch import Batch

MAX_PINNED_BATCHES = 4  # that wait in pinned memory for a GPU
END_TIMEOUT = 60.0  # seconds in which a batch that has been begun is made


class Ahead:
    """Batches made ahead by a thread, in pinned memory, so that they reach a GPU while it computes.

    While the thread runs, `batches` and the data that it reads belong to it; `end` gives them back. The batches end
    where those of `batches` end. An exception in the thread is raised where the next batch is asked for.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def __iter__(self) -> Iterator[Batch]:
        self.end()
        waiting: queue.Queue[Batch | BaseException | None] = queue.Queue(MAX_PINNED_BATCHES)
        ended = self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(waiting, ended), name="batches", daemon=True)
        self._thread.start()
        try:
            while not ended.is_set():
                batch = waiting.get()
                if batch is None:
                    return
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
            raise RuntimeError("the batches that were read ahead have been dropped; they must be iterated over again")
        finally:
            if ended is self._ended:
                self.end()

    def end(self) -> None:
        """Ends the thread and drops what it has made. An iteration that is asked for more raises RuntimeError.

        Raises:
            TimeoutError: the thread is still making a batch after END_TIMEOUT; it owns the data until it ends.
        """
        self._ended.set()
        if self._thread is not None:
            self._thread.join(END_TIMEOUT)
            if self._thread.is_alive():
                raise TimeoutError(f"the thread that reads the data ahead has not ended in {END_TIMEOUT:.0f} s")
            self._thread = None

    def _read(self, waiting: queue.Queue[Batch | BaseException | None], ended: threading.Event) -> None:
        try:
            for batch in self.batches:
                _put(waiting, batch.pin(), ended)
                if ended.is_set():
                    return
            _put(waiting, None, ended)
        except BaseException as error:
            _put(waiting, error, ended)


def _put(waiting: queue.Queue[Any], item: Any, ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            waiting.put(item, timeout=0.1)
            return
        except queue.Full:
            continue
