"""A reason to stop reaches all ranks with a collective that each step has anyway."""

from __future__ import annotations

import signal
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import lightning as L
import pytest
import torch
from torch import Tensor

from rwkv_train.models import State
from rwkv_train.training import step_verdict
from rwkv_train.training.callbacks import stop
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.step_verdict import StepVerdict

RANKS = 3


class LayerState(NamedTuple):
    vector: Tensor


STATE = State((LayerState(torch.zeros(1, 4)),))


class Group:
    """A process group whose ranks are threads; one that waits alone fails."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=10)
        self.parts: dict[str, Tensor] = {}
        self.calls = 0

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return RANKS

    def all_reduce(self, value: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        self.parts[threading.current_thread().name] = value.clone()
        if self.barrier.wait() == 0:
            self.calls += 1
        parts = torch.stack(list(self.parts.values()))
        total = parts.amax(0) if op == self.ReduceOp.MAX else parts.sum(0)
        self.barrier.wait()
        value.copy_(total)


def module() -> RWKVModule:
    found = RWKVModule.__new__(RWKVModule)
    L.LightningModule.__init__(found)
    found.verdict = StepVerdict()
    return found


@pytest.mark.parametrize("in_flight", [0, 1], ids=["cpu", "gpu"])
@pytest.mark.parametrize("reason", ["budget.hours", "signal"])
def test_all_ranks_stop_at_one_step_and_a_step_costs_no_collective_more(
    reason: str, in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a reason on one rank only, after the backward pass of step 5: it is known one or two steps after 6."""
    group, clock, ended = Group(), [0.0] * RANKS, {}
    for module_of in (step_verdict, stop):
        monkeypatch.setattr(module_of, "dist", group)
    monkeypatch.setattr(stop, "time", SimpleNamespace(monotonic=lambda: clock[int(threading.current_thread().name)]))

    def run(rank: int) -> None:
        metrics: Any = SimpleNamespace(stop_asked=False)
        budget, signals = stop.StopAtBudget(50, 60.0, metrics), stop.StopOnSignal()
        signals.connect(cast(Any, SimpleNamespace(takes=None)), metrics)
        strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda value: value)
        trainer: Any = SimpleNamespace(
            world_size=RANKS, accumulate_grad_batches=1, val_check_batch=1000, should_stop=False
        )
        trainer.strategy, trainer.is_global_zero, trainer.global_step = strategy, rank == 0, 0
        trained, pending = module(), deque[Tensor]()
        while not trainer.should_stop and trainer.global_step < 20:
            while len(pending) > in_flight:  # as Metrics.write
                metrics.stop_asked |= bool(pending.popleft() > 0)
            trained.verdict.begin_step(torch.device("cpu"))
            trained.verdict.record_microbatch(torch.tensor(2.5), STATE)
            for callback in (budget, signals):
                callback.on_before_backward(trainer, trained, None)
            trainer.global_step += 1
            if trainer.global_step == 5 and reason == "signal" and rank == 2:
                signals.received = signal.SIGTERM
            if trainer.global_step == 5 and reason == "budget.hours" and rank == 0:
                clock[rank] = 61.0
            trained.verdict.judge(torch.tensor(1.0))
            assert trained.verdict.loss == 2.5
            pending.append(trained.verdict.stops)  # type: ignore[arg-type]
            for callback in (budget, signals):
                callback.on_train_batch_end(trainer, trained, None, None, trainer.global_step - 1)
        ended[rank] = trainer.global_step, budget.out_of_time, signals.stopped

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = 7 + in_flight
    assert ended == dict.fromkeys(range(RANKS), (last, reason != "signal", "SIGTERM" if reason == "signal" else None))
    assert group.calls == last + 2, "that of each step, and of the last one those that exchange the reasons"
