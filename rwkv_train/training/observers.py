"""What follows a run beside its training step: our callbacks, in the order in which they are called, and trackers."""

from __future__ import annotations

import platform
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback

from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.config.schema import differences
from rwkv_train.errors import UserError
from rwkv_train.json_files import parse_json
from rwkv_train.planning.report import as_json
from rwkv_train.rundir.jsonl import Events, WriteErrors
from rwkv_train.rundir.replay_file import load_replay
from rwkv_train.trackers import TrackedRun
from rwkv_train.trackers.launch import TRACKER_SECONDS, Trackers
from rwkv_train.training.attempt import RunAttempt
from rwkv_train.training.callbacks.bad_steps import BadSteps
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback
from rwkv_train.training.callbacks.metrics import Metrics, Spent
from rwkv_train.training.callbacks.profiling import Profiling
from rwkv_train.training.callbacks.progress import ProgressBar
from rwkv_train.training.callbacks.stop import StopAtBudget, StopOnSignal
from rwkv_train.training.callbacks.watchdog import Watchdog
from rwkv_train.training.replay import Replay
from rwkv_train.training.setup import RunSetup, versions
from rwkv_train.training.user_classes import prepare_loggers
from rwkv_train.user_path import user_path

TRACKER_SECONDS_AFTER_SIGNAL = 5.0  # seconds that trackers have where a signal has ended the run


@dataclass(frozen=True)
class Observers:
    """Our callbacks. Lightning calls each hook of them in the order of these fields.

    What depends on the order:
        - `metrics` writes a step's row, which `bad_steps` judges, before the next step begins.
        - `bad_steps` rewinds the run before `checkpoint` could save the state after a bad step.
        - `signals` stops a run at the step that `budget` may end: both before `watchdog`.
        - `watchdog` comes after the callbacks that wait for other ranks: their waiting is part of the step.

    Attributes:
        metrics: writes metrics.jsonl.
        bad_steps: leaves out, rewinds or stops.
        checkpoint: saves when a save is due.
        progress: the console's bar or lines.
        profiling: with profile=true.
        replay: with replay=FILE.
        budget: stops at the last step or when the time is up.
        signals: stops after a signal.
        watchdog: reports the phase that the rank is in.
        first_sample: generates text before the first step, where rank 0 holds all weights.
    """

    metrics: Metrics
    bad_steps: BadSteps
    checkpoint: CheckpointCallback
    progress: ProgressBar
    profiling: Profiling | None
    replay: Replay | None
    budget: StopAtBudget
    signals: StopOnSignal
    watchdog: Watchdog
    first_sample: LambdaCallback | None

    def in_order(self) -> list[Callback]:
        """The callbacks that this run has."""
        return [callback for field in fields(self) if (callback := getattr(self, field.name)) is not None]


def make_observers(
    setup: RunSetup,
    attempt: RunAttempt,
    write_errors: WriteErrors,
    signals: StopOnSignal,
    trackers: RunTrackers,
    first_sample: LambdaCallback | None = None,
) -> Observers:
    """Makes the callbacks of a run, and connects them with each other.

    Args:
        setup: of the run.
        attempt: whose records they write.
        write_errors: counts what the disk refuses.
        signals: heard since before the attempt began.
        trackers: started already.
        first_sample: see Observers.
    """
    config, run, data, console = setup.config, setup.directory, setup.data, setup.console
    events, lines = attempt.events, attempt.metrics
    before_exit = partial(events.refresh, force=True)
    alone, one_node, node = setup.resolved.mesh.ranks == 1, setup.resolved.nodes == 1, setup.rank_info.node
    watchdog = Watchdog(config.watchdog, run.attempts, setup.first, alone, one_node, node, before_exit)
    meta = {
        "config": setup.tree,
        "data": data.digest,
        "tokenizer": data.tokenizer.identity,
        "versions": versions(),
    }
    saving = CheckpointCallback(
        run.checkpoints,
        config.checkpoint,
        config.batch.tokens,
        data,
        meta,
        events,
        setup.storage,
        watchdog.waiting_for_disk,
        attempt.same_data,
    )
    spent = Spent.of(run.attempts, lines) if setup.first else None  # the other ranks write no rows
    metrics = Metrics(lines, data, config.optim.clip, lambda: saving.paused, spent)
    signals.connect(saving, metrics)
    trackers.follow(metrics, events)
    bad_steps = BadSteps(
        config.health, metrics, saving, data, run, setup.tree, events, write_errors, console, attempt.rewinds
    )
    hours = config.budget.hours
    validation = config.validation.every.in_steps(config.batch.tokens) if data.validated else None
    return Observers(
        metrics=metrics,
        bad_steps=bad_steps,
        checkpoint=saving,
        progress=ProgressBar(
            metrics, saving, attempt.total_steps, console, validation if config.checkpoint.best else None
        ),
        profiling=Profiling(run.path, console) if config.profile else None,
        replay=None if config.replay is None else Replay(load_replay(user_path(config.replay)), console),
        budget=StopAtBudget(attempt.total_steps, None if hours is None else hours * 3600, metrics),
        signals=signals,
        watchdog=watchdog,
        first_sample=first_sample,
    )


class RunTrackers:
    """The trackers of `logger=`, on rank 0; leaving the block ends them.

    Args:
        setup: of the run.

    Raises:
        UserErrors: a logger that cannot be found, or whose arguments do not fit.
    """

    def __init__(self, setup: RunSetup) -> None:
        self.setup = setup
        self._patience = TRACKER_SECONDS
        self._trackers: Trackers | None = None
        self._trees = prepare_loggers(setup.config)  # they are made by `start`

    def __enter__(self) -> RunTrackers:
        return self

    def start(self, step: int, meta: CheckpointMeta | None) -> None:
        """Starts them, on rank 0.

        Args:
            step: that the run resumes from; 0 for a new run.
            meta: of the checkpoint; None: there is none.
        """
        config, run = self.setup.config, self.setup.directory
        if not self.setup.first or not self._trees:
            return
        tree, code = self.setup.tree, versions()
        changed = meta is not None and bool(differences(meta.config, tree) or meta.versions != code)
        info = {"config": tree, "versions": code, **_surroundings(self.setup)}
        tracked = TrackedRun(run.path.absolute(), run.path.name, info, changed)
        self._trackers = Trackers(self._trees, config.packages, tracked, step, run)

    def follow(self, metrics: Metrics, events: Events) -> None:
        """Connects those that live in this process with the run's rows and events."""
        if self._trackers is not None:
            metrics.listeners.append(self._trackers.row)
            events.listeners.append(self._trackers.event)

    def hurry(self) -> None:
        """A signal ends the run: they have little time for the last rows."""
        self._patience = TRACKER_SECONDS_AFTER_SIGNAL

    def __exit__(self, *error: object) -> None:
        if self._trackers is None:
            return
        for name in self._trackers.close(self._patience):
            self.setup.console.print(
                f"logger={name} has not taken all rows within {self._patience:g} s and was ended; "
                f"`rwkv-train report {self.setup.directory.path} --push {name}` sends them again"
            )


def _surroundings(setup: RunSetup) -> dict[str, Any]:
    """Data, hardware and plan of a run, for trackers."""
    data, resolved = setup.data, setup.resolved
    try:
        plan = parse_json(as_json(resolved.plan(setup.config, data.vocabulary), setup.config, None))
    except UserError as error:
        plan = {"error": str(error)}
    return {
        "parameters": setup.parameters,
        "data": {
            "digest": data.digest,
            "tokenizer": data.tokenizer.identity,
            "sources": [
                {"name": s.name, "digest": s.digest, "tokens": len(s.train), "held_out": len(s.held_out)}
                for s in data.sources
            ],
            "description": data.description,
        },
        "hardware": {
            "host": platform.node(),
            "device": torch.cuda.get_device_name() if resolved.gpu else f"{platform.machine()} CPU",
            "ranks": resolved.mesh.ranks,
            "threads": resolved.threads,
            "python": platform.python_version(),
        },
        "plan": plan,
    }
