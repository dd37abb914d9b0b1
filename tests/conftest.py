"""Shared by all tests: several ranks in one call, one thread, no change of the environment for the next test."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from rwkv_train.data import workers
from rwkv_train.models import ARCHITECTURES
from tests import LONGEST, PRELOAD

workers.PRELOAD[:] = PRELOAD

TESTS = Path(__file__).parent

# Set by libraries for themselves, once per process and whatever the test: torch.compile's caches, and the
# variable in which pytest names the test that runs.
LIBRARIES_OWN = {
    "HF_XET_HIGH_PERFORMANCE",
    "KMP_DUPLICATE_LIB_OK",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
    "TRITON_CACHE_DIR",
    "WANDB_SERVICE",
    "PYTEST_CURRENT_TEST",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the files that take longest come first, see LONGEST."""
    order = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_configure() -> None:
    """Signals that the shell ignores (nohup, `&`) would be ignored by every process that a test starts, too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def environment_is_restored() -> Iterator[None]:
    """Fails a test after which the environment differs or a process group still exists, and restores both."""
    before = dict(os.environ)
    yield
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    changed -= LIBRARIES_OWN
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    distributed = sys.modules.get("torch.distributed")
    group = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if distributed is not None and group:
        distributed.destroy_process_group()
    assert not changed, f"the test changed the environment: {', '.join(sorted(changed))}"
    assert not group, "the test did not destroy its process group"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: the tests beside this one use the other cores, and threads that wait for a core spin.

    tests/ops overrides it, where the engines divide their work among threads.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(ARCHITECTURES))
def arch(request: pytest.FixtureRequest) -> str:
    """Each architecture: a test that takes it runs once for each."""
    return str(request.param)


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(fn, n, *args, seconds=120)`: fn(rank, n, *args) in n processes that share a gloo group.

    fn is a function of a test module (it is pickled by name). Returns what the ranks returned, in their order; the
    first rank that fails fails the test with its own traceback, and the others are ended.
    """
    return _run_ranks


def _run_ranks(fn: Callable[..., Any], ranks: int, *args: Any, seconds: float = 120) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=_one_rank, args=(pipes[rank][1], port, fn, rank, ranks, args)) for rank in range(ranks)
    ]
    results: dict[int, Any] = {}
    end = monotonic() + seconds
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()  # the child has its own; so the end of a child is seen as the end of its pipe
        waiting = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0, end - monotonic()))
            assert ready, f"ranks {sorted(waiting.values())} did not finish in {seconds} s"
            for receiver in ready:
                assert isinstance(receiver, Connection)
                rank = waiting.pop(receiver)
                try:
                    failure, results[rank] = receiver.recv()
                except EOFError:
                    failure = "ended without a report"
                assert failure is None, f"rank {rank}: {failure}"
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == ranks else 0)
            process.kill()
            process.join()
    return [results[rank] for rank in range(ranks)]


def _one_rank(
    result: Connection, port: int, fn: Callable[..., Any], rank: int, ranks: int, args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
        result.send((None, fn(rank, ranks, *args)))
        dist.barrier()  # no rank takes the group down while another still uses it
    except BaseException:
        result.send((traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
