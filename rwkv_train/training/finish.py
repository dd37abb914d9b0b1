"""The end of a run: which of its endings it is, what is written then, and the exit code."""

from __future__ import annotations

from rwkv_train.checkpoint.directory import newest
from rwkv_train.exit_codes import Ending, ExitCode
from rwkv_train.training.build import Training
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback
from rwkv_train.training.observers import RunTrackers
from rwkv_train.training.outputs import write_outputs
from rwkv_train.training.requeue import Requeue


def finish(training: Training, trackers: RunTrackers, requeue: Requeue) -> Ending:
    """After Lightning's loop has ended by itself: records why, and writes what belongs to that ending.

    Args:
        training: of the run.
        trackers: which get little time where a signal has ended the run.
        requeue: puts the job back after a signal.
    """
    observers, events = training.observers, training.attempt.events
    step, resumable = training.trainer.global_step, next_start(observers.checkpoint)
    if observers.replay is not None:
        return Ending(ExitCode.NEGATIVE if observers.replay.healthy else ExitCode.FINISHED)
    if observers.signals.stopped and step != training.setup.total_steps:
        trackers.hurry()
        signals = observers.signals
        return requeue.after_signal(events, step, observers.signals.stopped, signals.too_late, resumable)
    if (reason := observers.bad_steps.stopped) is not None:
        events.add("unhealthy", step, reason=reason)
        return Ending(ExitCode.UNHEALTHY, f"\nstopped at step {step}: {reason}; {resumable}")
    return _complete(training, step, resumable)


def _complete(training: Training, step: int, resumable: str) -> Ending:
    """The budget is reached, in steps or in time, or a callback of the user's has stopped the run."""
    setup, attempt, observers = training.setup, training.attempt, training.observers
    total, write_errors = setup.total_steps, training.write_errors
    attempt.events.add("finished" if step == total else "stopped", step)
    if setup.first:
        write_outputs(setup, training.strategy, step, attempt.metrics.rows(), write_errors)
    messages = []
    if step != total:
        out_of_time = f"budget.hours={setup.config.budget.hours:g} is over" if observers.budget.out_of_time else None
        why = out_of_time or "a callback stopped the run"
        messages.append(f"\n{why}: step {step}" + (f" of {total}" if total else "") + f"; {resumable}")
    refused = write_errors.count + observers.checkpoint.failures + attempt.metrics.lost + attempt.events.lost
    if refused:
        kept = newest(setup.directory.checkpoints)[0] or "none"
        warning = f"the disk refused {refused} writes; the last complete checkpoint is {kept}"
        messages.append(f"[bold red]WARNING[/bold red]: {warning}")
    return Ending(ExitCode.WRITES_REFUSED if refused else ExitCode.FINISHED, "\n".join(messages))


def next_start(saving: CheckpointCallback) -> str:
    """What the same command does next, for people."""
    if saving.last is None:
        return "there is no checkpoint yet: the same command starts at step 0"
    return f"the same command resumes from the checkpoint of step {saving.last}"
