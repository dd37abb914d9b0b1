"""Processes that tokenise: each has the tokenizer loaded, and ends with the process that began it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

from rwkv_train.cluster.rendezvous import die_with_parent
from rwkv_train.data.tokenizers import Tokenizer, load_tokenizer

PRELOAD = ["rwkv_train.data.prepare.shards"]  # imported once, not once for each process
RUN_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}  # sent to all processes of a job or shell
SHUTDOWN_SECONDS = 60.0  # a shard takes about 30 at most

_tokenizer: Tokenizer  # of this process


class _Worker(ForkServerProcess):
    """A process whose SIGTERM is blocked. When a pool breaks, its executor terminates the others and joins them."""

    def terminate(self) -> None:
        self.kill()


class _WorkerContext(ForkServerContext):
    Process = _Worker


class _Pool(ProcessPoolExecutor):
    """Its processes hold one end of a pipe whose other end, never written to, closes with this process."""

    def __init__(self, workers: int, name: str, extend: Sequence[str]) -> None:
        context = _WorkerContext()
        context.set_forkserver_preload(PRELOAD)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
        try:
            resource_tracker.ensure_running()  # ignores SIGTERM by itself, and lets this process have it again
            signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
            forkserver.ensure_running()  # it and its children have those signals blocked
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs, self._ours = context.Pipe(duplex=False)
        super().__init__(workers, context, _begin, (name, tuple(extend), theirs))
        # All processes start with the first task. The death of one that a later task starts is noticed only at the
        # executor's next event, possibly never: it is woken up before the new process is among those that it watches.
        self._safe_to_dynamically_spawn_children = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As the executor's, but tasks that run get SHUTDOWN_SECONDS to end; then their processes are killed.

        Nothing here waits without a limit: the executor joins its thread, which joins the processes, and on Python 3.12
        and later holds a lock meanwhile that `shutdown` needs even where it is not to wait.
        """
        processes = list((self._processes or {}).values())
        options = {"wait": wait, "cancel_futures": cancel_futures}
        ending = threading.Thread(target=super().shutdown, kwargs=options, daemon=True)
        ending.start()
        ending.join(SHUTDOWN_SECONDS)
        if ending.is_alive():
            for process in processes:
                process.kill()
            ending.join(SHUTDOWN_SECONDS)


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
    signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)  # the fork server may have been started by other code
    die_with_parent(os.getppid())  # the fork server, which has one thread and ends with the process that began it
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    set_up(name, extend)


def _end_with(lifeline: Connection) -> None:
    """Ends this process when the one that started it has ended: else its fork server would keep it waiting."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)
