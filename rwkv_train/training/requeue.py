"""How a run comes back after a signal or a failure, and when it does not."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from rwkv_train.cluster.rank_info import another_has_ended
from rwkv_train.cluster.slurm import Job
from rwkv_train.errors import UserError
from rwkv_train.rundir.history import MAX_FAILURES, History
from rwkv_train.rundir.jsonl import Events, JsonLines
from rwkv_train.training.callbacks.stop import StopOnSignal
from rwkv_train.training.setup import RunSetup
from rwkv_train.training.strategy import ShardedStrategy

_PATIENCE = 0.5  # seconds for the last words of another rank
GIVEN_UP = 6  # exit code: the run has failed several times at one step, and another try would as well


class Requeue:
    """What one start of a run owes to the next one.

    Args:
        setup: of the run.

    Attributes:
        history: of its starts until now.
        signals: the callback that stops it.
    """

    def __init__(self, setup: RunSetup) -> None:
        self.setup, self.history = setup, History([], [])
        self.signals = StopOnSignal(self.seconds_left)
        self._leaving: tuple[Events, int] | None = None
        rank_info, settings = setup.rank_info, setup.config.cluster
        self.job = None if rank_info.job is None else Job(rank_info.job, settings.requeue)

    def hopeless(self, events: Events) -> bool:
        """Whether the starts before have failed too often at one step; that is said, and counted no more."""
        if self.history.failures() < MAX_FAILURES:
            return False
        self._give_up(events, self.history.reached, self.history.last_failure())
        return True

    def seconds_left(self) -> float | None:
        """Between a signal and the end, as SLURM or `cluster.grace` says."""
        left = self.job.seconds_left() if self.job is not None else None
        return self.setup.config.cluster.grace if left is None else left

    def after_signal(self, events: Events, step: int, name: str, too_late: str | None, next_time: str) -> None:
        """Tells what has stopped the run, and whether `requeue` will put its job back."""
        say = self.setup.console.print
        late = {} if too_late is None else {"no_checkpoint": too_late}
        events.add("interrupted" if name == "SIGINT" else "preempted", step, signal=name, **late)
        if too_late is not None:
            say(f"\nno checkpoint of step {step}: {too_late}")
        say(f"\n{name} at step {step}; {next_time}")
        if self.job is None or not self.setup.first or name == "SIGINT":
            return
        if (other := self.job.why_not()) is not None:
            say(f"not put back into the queue by the run: {other}")
            return
        say(f"job {self.job.number} goes back into the queue")
        events.add("requeued", step, job=self.job.number)
        self._leaving = events, step

    def requeue(self) -> None:
        """Puts the job back, where a signal has stopped the run; the first rank alone does, and once.

        Must come last: SLURM ends the job's processes as soon as it is asked.
        """
        if self._leaving is None or self.job is None:
            return
        (events, step), self._leaving = self._leaving, None
        if (failure := self.job.requeue()) is not None:
            self.setup.console.print(f"[bold red]not put back into the queue[/bold red]: {failure}")
            events.add("requeue_failed", step, reason=failure)
            events.close()

    def after_failure(self, error: BaseException, events: Events, lines: JsonLines, strategy: ShardedStrategy) -> bool:
        """Notes why this start ends, in the words of the rank that failed first, as far as they can be had.

        Returns:
            whether it has failed too often at this step, which is said.
        """
        if isinstance(error, (UserError, KeyboardInterrupt, SystemExit)):
            return False
        rank_info, said = self.setup.rank_info, " ".join(str(error).split())
        what = "another rank has ended" if another_has_ended(error) else f"{type(error).__name__}: {said[:200]}"
        reason = f"rank {rank_info.rank} on {rank_info.node}: {what}"
        board: Any = getattr(getattr(strategy, "writer", None), "store", None)
        with suppress(Exception):  # the first rank may be the one that has ended, and its store with it
            if not rank_info.first:
                board.set("failed", reason)
            elif strategy.world_size > 1 and isinstance(error, RuntimeError):  # it may be the other one's failure
                end = time.monotonic() + _PATIENCE
                while not board.check(["failed"]) and time.monotonic() < end:
                    time.sleep(0.05)
                reason = board.get("failed").decode() if board.check(["failed"]) else reason
        if not rank_info.first:
            return False
        rows = lines.rows()
        reached = int(rows[-1]["step"]) if rows else 0
        events.add("failed", reached, reason=reason)
        hopeless = History(events.rows(), rows).failures() >= MAX_FAILURES
        if hopeless:
            self._give_up(events, reached, reason)
        return hopeless

    def _give_up(self, events: Events, step: int, reason: str) -> None:
        events.add("given_up", step, reason=reason)
        self.setup.console.print(
            f"[bold red]{self.setup.directory.path} has failed {MAX_FAILURES} times at step {step}[/bold red]: "
            f"{reason}\n"
            f"  the same command tries again once that is mended; each rank's words: {self.setup.directory.logs}"
        )
