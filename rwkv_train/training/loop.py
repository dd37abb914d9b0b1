"""A run from its claim of the directory to its exit code: build, train, finish."""

from __future__ import annotations

import hashlib
import signal
from contextlib import ExitStack

import yaml

from rwkv_train.cluster.preflight import run_preflight
from rwkv_train.console import ERROR_STYLE
from rwkv_train.data.batch_preview import show_batch
from rwkv_train.data.datamodule import DataModule
from rwkv_train.exit_codes import Ending, ExitCode
from rwkv_train.rundir.attempts import Superseded
from rwkv_train.rundir.crash_file import crash_file
from rwkv_train.rundir.jsonl import WriteErrors
from rwkv_train.rundir.rank_logs import keep_log
from rwkv_train.training.attempt import RunAttempt, open_attempt
from rwkv_train.training.build import Training, build
from rwkv_train.training.finish import finish, finish_again, next_start
from rwkv_train.training.observers import RunTrackers
from rwkv_train.training.requeue import Requeue
from rwkv_train.training.setup import RunSetup, describe, versions
from rwkv_train.training.user_classes import prepare_callbacks


def fit(setup: RunSetup) -> ExitCode:
    """Trains until the budget is reached.

    Returns:
        the exit code; 0 on ranks but the first, since Lightning kills the first rank when another one's is not 0.

    Raises:
        UserError: a logger or callback that cannot be made, a directory in use, a checkpoint that does not fit.
    """
    config, console = setup.config, setup.console
    callbacks = prepare_callbacks(config)
    trackers, requeue, write_errors = RunTrackers(setup), Requeue(setup), WriteErrors()
    with (
        setup.directory.claimed(setup.first, setup.rank_info.job),
        requeue.signals.heard(),
        trackers,
        ExitStack() as stack,
    ):
        _meet_ranks(setup)
        attempt = open_attempt(setup, write_errors, stack)
        if attempt is None:
            if setup.first:
                finish_again(setup, write_errors)
            return ExitCode.WRITES_REFUSED if write_errors.count else ExitCode.FINISHED
        stack.enter_context(crash_file(setup.directory.logs, setup.rank_info.rank))
        ending = requeue.give_up_at_start(attempt)
        if ending is None:
            _announce(attempt, setup, trackers)
            training = build(setup, attempt, write_errors, requeue.signals, trackers, callbacks)
            ending = _train(training, requeue) or finish(training, trackers, requeue)
        if ending.message:
            failed = ending.code in (ExitCode.WRITES_REFUSED, ExitCode.GIVEN_UP)
            console.print(ending.message, style=ERROR_STYLE if failed else None)
    requeue.requeue()
    return ending.code if setup.first else ExitCode.FINISHED


def _meet_ranks(setup: RunSetup) -> None:
    """Checks that the ranks which were started together agree, and opens a log for each."""
    if setup.rank_info.ranks > 1:
        tree = hashlib.sha256(yaml.safe_dump(setup.tree).encode()).hexdigest()[:16]
        facts = {"code": versions()["code"], "config": tree, "data": setup.data.digest}
        seconds, needed = setup.config.cluster.preflight, 2 * 12 * setup.parameters
        run_preflight(setup.rank_info, setup.resolved.gpu, facts, setup.directory.path, needed, seconds, setup.console)
    if setup.resolved.mesh.ranks > 1:
        keep_log(setup.directory.logs, setup.rank_info)


def _announce(attempt: RunAttempt, setup: RunSetup, trackers: RunTrackers) -> None:
    """Records that the attempt starts, starts the trackers, and prints what is about to be trained."""
    events, earlier = attempt.events, attempt.history.next_start(attempt.step)
    events.add("started" if attempt.checkpoint is None else "resumed", attempt.step, **earlier)
    trackers.start(attempt.step, attempt.meta)
    describe(setup, attempt)
    if setup.data.masked and attempt.step == 0:
        show_batch(setup.data.batch(0), setup.data.tokenizer, setup.console, rows=1)


def _train(training: Training, requeue: Requeue) -> Ending | None:
    """Runs Lightning's loop, under the watchdog; the ending where it was broken off, else None."""
    setup, trainer, strategy = training.setup, training.trainer, training.strategy
    data, checkpoint = DataModule(setup.data), training.attempt.checkpoint
    try:
        with training.observers.watchdog.watching(strategy):
            trainer.fit(training.module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit:  # Lightning's answer to a Ctrl-C before the first step
        if not trainer.interrupted:
            raise
        return Ending(
            ExitCode.INTERRUPTED, f"\ninterrupted; {next_start(training.observers.checkpoint, setup.config.resume)}"
        )
    except Superseded:
        what = f"a newer start of {setup.directory.path} has taken over; this one ends at step {trainer.global_step}"
        return Ending(ExitCode.SUPERSEDED, f"\n{what}")
    except BaseException as error:
        given_up = requeue.after_failure(error, training.attempt, strategy)
        if strategy.launcher is not None:  # the ranks that it has started would wait for this one
            strategy.launcher.kill(signal.SIGKILL)
        if given_up is None:
            raise
        return given_up
    finally:
        setup.data.close()
        if setup.data.left_out:
            setup.console.print(setup.data.left_out)
    return None
