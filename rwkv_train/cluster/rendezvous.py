"""Limits of the time in which the ranks of a run find each other. Standard library only: it comes before torch.

torch waits for missing ranks in native code, for half an hour, and no Python handler runs meanwhile: a signal to stop
would be held back until then. So a thread watches.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rwkv_train.exit_codes import ExitCode

RENDEZVOUS_SECONDS = 300.0  # for ranks that rank 0 has started on this node: they import torch and open the data first
_GRACE_SECONDS = 2.0  # in which the ranks may still find each other after a signal; then the run ends by itself
_POLL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # of prctl


def follow_parent(parent: int) -> None:
    """Ends this process when the one that has started it has ended: without it, the others wait for half an hour.

    Args:
        parent: process ID of this process's parent.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(ExitCode.FAILED)

    threading.Thread(target=follow, name="parent", daemon=True).start()


def die_with_parent(parent: int) -> None:
    """Lets Linux kill this process when its parent ends, even while native code keeps every Python thread waiting.

    Linux does so when the *thread* ends that has started this process: only for those that a main thread has started.

    Args:
        parent: process ID of this process's parent; where it has ended already, this process ends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(ExitCode.FAILED)


def outlive_parent() -> None:
    """Undoes `die_with_parent`: from now on the watchdog ends this process, after it has written its stacks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


@contextmanager
def rendezvous(ranks: int, seconds: float = RENDEZVOUS_SECONDS) -> Iterator[None]:
    """Ends this process where the block takes longer, or where a signal arrives while the block waits.

    Args:
        ranks: that have to find each other; with 1 there is nothing to wait for.
        seconds: that the block may take.
    """
    if ranks == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader, over, ranks, seconds), name="rendezvous", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(previous)
        os.write(writer, b"\0")  # wakes the thread
        watch.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, over: threading.Event, ranks: int, seconds: float) -> None:
    """Runs in a thread until the rendezvous is over, or ends the process.

    Args:
        reader: gives the number of each signal that arrives.
        over: set when the rendezvous is over.
        ranks, seconds: see `rendezvous`.
    """
    ready, _, _ = select.select([reader], [], [], seconds)
    number = os.read(reader, 1)[0] if ready else 0
    if over.wait(_GRACE_SECONDS if ready else 0):
        return
    if number:
        code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.STOPPED
        message = f"{signal.Signals(number).name} while the {ranks} ranks wait for each other: the run ends"
    else:
        code = ExitCode.FAILED
        message = f"error: the {ranks} ranks of the run did not find each other in {seconds:g} s"
    print(message, file=sys.stderr, flush=True)
    os._exit(code)
