"""How a job is requeued after a signal or a failure, and when it is not."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from rwkv_train.cluster.rank_info import another_has_ended
from rwkv_train.cluster.slurm import Job
from rwkv_train.console import ERROR_STYLE
from rwkv_train.errors import UserError
from rwkv_train.exit_codes import Ending, ExitCode
from rwkv_train.rundir.history import MAX_FAILURES, History
from rwkv_train.rundir.jsonl import Events
from rwkv_train.training.attempt import RunAttempt
from rwkv_train.training.callbacks.stop import StopOnSignal
from rwkv_train.training.setup import RunSetup
from rwkv_train.training.strategy import ShardedStrategy

REASON_TIMEOUT = 0.5  # seconds that a rank waits for the reason of another one's failure


class Requeue:
    """What this start of a run does for the next one.

    Args:
        setup: of the run.

    Attributes:
        signals: the callback that stops the run after a signal.
    """

    def __init__(self, setup: RunSetup) -> None:
        self.setup = setup
        self.signals = StopOnSignal(self.seconds_left)
        self._leaving: tuple[Events, int] | None = None
        rank_info, settings = setup.rank_info, setup.config.cluster
        self.job = None if rank_info.job is None else Job(rank_info.job, settings.requeue)

    def seconds_left(self) -> float | None:
        """Seconds between a signal and the end, from SLURM or `cluster.grace`; None: not known."""
        left = self.job.seconds_left() if self.job is not None else None
        return self.setup.config.cluster.grace if left is None else left

    def give_up_at_start(self, attempt: RunAttempt) -> Ending | None:
        """The ending of an attempt that does not begin, as those before it have failed too often at one step.

        That ending is recorded, so that the next start tries again. On rank 0 only; None elsewhere.
        """
        history = attempt.history
        if not self.setup.first or history.failures() < MAX_FAILURES:
            return None
        return self._given_up(attempt.events, history.reached, history.last_failure())

    def after_signal(self, events: Events, step: int, name: str, too_late: str | None, resumable: str) -> Ending:
        """Records which signal has stopped the run, and decides whether `requeue` will requeue its job.

        Args:
            events: of the attempt.
            step: the last one.
            name: of the signal.
            too_late: why there is no checkpoint of that step; None: there is one.
            resumable: what the next start does, for people.
        """
        late = {} if too_late is None else {"no_checkpoint": too_late}
        events.add("interrupted" if name == "SIGINT" else "preempted", step, signal=name, **late)
        messages = [] if too_late is None else [f"\nno checkpoint of step {step}: {too_late}"]
        messages.append(f"\n{name} at step {step}; {resumable}")
        if self.job is not None and self.setup.first and name != "SIGINT":
            if (reason := self.job.why_not()) is not None:
                messages.append(f"not requeued by the run: {reason}")
            else:
                messages.append(f"job {self.job.number} is requeued")
                events.add("requeued", step, job=self.job.number)
                self._leaving = events, step
        return Ending(ExitCode.STOPPED, "\n".join(messages))

    def requeue(self) -> None:
        """Requeues the job, where a signal has stopped the run; only rank 0 does, and once.

        Must come last: SLURM ends the job's processes as soon as it is asked.
        """
        if self._leaving is None or self.job is None:
            return
        (events, step), self._leaving = self._leaving, None
        if (failure := self.job.requeue()) is not None:
            self.setup.console.print(f"not requeued: {failure}", style=ERROR_STYLE)
            events.add("requeue_failed", step, reason=failure)
            events.close()

    def after_failure(self, error: BaseException, attempt: RunAttempt, strategy: ShardedStrategy) -> Ending | None:
        """Records why this attempt fails, as the rank that failed first has put it, if that can be had.

        Returns:
            the ending where the run has failed too often at this step; None: the error is to be raised.
        """
        if isinstance(error, (UserError, KeyboardInterrupt, SystemExit)):
            return None
        reason = self._first_reason(error, strategy)
        if not self.setup.first:
            return None
        events, last = attempt.events, attempt.metrics.last_row()
        reached = int(last["step"]) if last else 0
        events.add("failed", reached, reason=reason)
        given_up = History(events.rows(), [last] if last else []).failures() >= MAX_FAILURES
        return self._given_up(events, reached, reason) if given_up else None

    def _first_reason(self, error: BaseException, strategy: ShardedStrategy) -> str:
        """Why the run fails; rank 0 waits a moment for another rank's reason, which may be the cause."""
        rank_info, text = self.setup.rank_info, " ".join(str(error).split())
        what = "another rank has ended" if another_has_ended(error) else f"{type(error).__name__}: {text[:200]}"
        reason = f"rank {rank_info.rank} on {rank_info.node}: {what}"
        board: Any = getattr(getattr(strategy, "writer", None), "store", None)
        with suppress(Exception):  # rank 0 may be the one that has ended, and its store with it
            if not rank_info.first:
                board.set("failed", reason)
            elif strategy.world_size > 1 and isinstance(error, RuntimeError):
                end = time.monotonic() + REASON_TIMEOUT
                while not board.check(["failed"]) and time.monotonic() < end:
                    time.sleep(0.05)
                reason = board.get("failed").decode() if board.check(["failed"]) else reason
        return reason

    def _given_up(self, events: Events, step: int, reason: str) -> Ending:
        events.add("given_up", step, reason=reason)
        run = self.setup.directory
        return Ending(
            ExitCode.GIVEN_UP,
            f"{run.path} has failed {MAX_FAILURES} times at step {step}: {reason}\n"
            f"  the same command tries again once the cause is removed; the logs of all ranks: {run.logs}",
        )
