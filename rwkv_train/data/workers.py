"""Processes that tokenise: each has the tokenizer loaded, and ends with the process that began it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from types import FrameType

from rwkv_train.data.tokenizers import Tokenizer, load_tokenizer

PRELOAD = ["rwkv_train.data.prepare.shards"]  # imported once, not once for each process
FOR_THE_RUN = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}  # SLURM sends them to all processes of a job
GRACE = 60.0  # seconds that a worker still works after a SIGTERM: the run saves meanwhile

_tokenizer: Tokenizer  # of this process


class _Pool(ProcessPoolExecutor):
    """Its processes hold one end of a pipe whose other end, never written to, closes with this process."""

    def __init__(self, workers: int, name: str, extend: Sequence[str]) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RUN)
        try:
            resource_tracker.ensure_running()  # ignores SIGTERM by itself, and lets this process have it again
            signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RUN)
            forkserver.ensure_running()  # it and its children have those signals blocked
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs, self._ours = context.Pipe(duplex=False)
        super().__init__(workers, context, _begin, (name, tuple(extend), theirs))


def pool(workers: int, name: str, extend: Sequence[str]) -> ProcessPoolExecutor:
    """That many processes with a tokenizer, which `tokenizer` gives to what runs there."""
    return _Pool(workers, name, extend)


def set_up(name: str, extend: Sequence[str]) -> None:
    """Lets `tokenizer` give that one in this process too."""
    global _tokenizer
    _tokenizer = load_tokenizer(name, extend)


def tokenizer() -> Tokenizer:
    return _tokenizer


def _begin(name: str, extend: Sequence[str], lifeline: Connection) -> None:
    os.nice(1)  # a machine that prepares can still be worked on
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    signal.signal(signal.SIGTERM, _end_later)  # an executor that breaks ends its processes by it, and waits for them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    set_up(name, extend)


def _end_later(number: int, frame: FrameType | None) -> None:
    timer = threading.Timer(GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _end_with(lifeline: Connection) -> None:
    """Ends this process when the one that began it is gone: its fork server would keep it waiting for work for ever."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)
