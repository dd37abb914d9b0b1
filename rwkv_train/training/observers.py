"""Everything that watches a run, put together: statistics, metrics, health, console, and the trackers' processes."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.config.schema import differences
from rwkv_train.errors import UserError
from rwkv_train.instantiate import prepare
from rwkv_train.planning.cards import cpu_card, present_card
from rwkv_train.planning.plan import make_plan
from rwkv_train.planning.report import as_json
from rwkv_train.rundir.jsonl import Events, JsonLines, WriteErrors
from rwkv_train.trackers import LocalTracker, TrackedRun, Tracker
from rwkv_train.trackers.launch import PATIENCE, Trackers
from rwkv_train.training.callbacks.bad_steps import BadSteps, read_passed_over
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback
from rwkv_train.training.callbacks.metrics import Metrics, Spent
from rwkv_train.training.callbacks.profiling import Profiling
from rwkv_train.training.callbacks.progress import ProgressBar
from rwkv_train.training.replay import Replay, read_replay
from rwkv_train.training.setup import RunSetup

HURRY = 5.0  # seconds that trackers have where a signal has ended the run


class Observers:
    """What watches a run. As a context manager it ends the trackers' processes with the run.

    Args:
        setup: of the run.
        write_errors: of its records.

    Raises:
        UserErrors: a logger that cannot be found, or whose arguments do not fit.
    """

    def __init__(self, setup: RunSetup, write_errors: WriteErrors) -> None:
        self.setup, self.write_errors = setup, write_errors
        self.patience = PATIENCE
        self._trackers: Trackers | None = None
        prepare(
            "logger", setup.config.logger, (Tracker, LocalTracker, Logger), setup.config.packages
        )  # made by `track`

    def __enter__(self) -> Observers:
        return self

    def callbacks(self, lines: JsonLines, events: Events, saving: CheckpointCallback) -> list[Callback]:
        """In the order in which they are to be called; the checkpoints' is among them."""
        config, setup, run = self.setup.config, self.setup, self.setup.directory
        spent = Spent.of(run.attempts, lines)
        metrics = Metrics(lines, setup.data.bytes_per_token, config.optim.clip, lambda: saving.paused, spent)
        if self._trackers is not None:
            metrics.listeners.append(self._trackers.row)
            events.listeners.append(self._trackers.event)
        self.health = BadSteps(
            config.health, metrics, saving, setup.data, run, setup.tree, events, self.write_errors, setup.console
        )
        self.health.rewinds = read_passed_over(run)["rewinds"]
        profiling = [Profiling(run.path, setup.console)] if config.profile else []
        progress = ProgressBar(metrics, saving, setup.total_steps, setup.console)
        self.replay = None if config.replay is None else Replay(read_replay(Path(config.replay)), setup.console)
        replay = [] if self.replay is None else [self.replay]
        return [metrics, self.health, saving, progress, *profiling, *replay]

    def track(self, step: int, meta: CheckpointMeta | None, versions: Any) -> None:
        """Starts the trackers of a run that continues from a step, on rank 0.

        Args:
            step: 0 for a new run.
            meta: description of the checkpoint; None: the run starts from step 0.
            versions: of the code, as checkpoints have them.
        """
        config, run = self.setup.config, self.setup.directory
        if not self.setup.first or not config.logger:
            return
        changed = meta is not None and bool(differences(meta.config, self.setup.tree) or meta.versions != versions)
        info = {"config": self.setup.tree, "versions": versions, **self._surroundings()}
        tracked = TrackedRun(run.path.absolute(), run.path.name, info, changed)
        self._trackers = Trackers(config.logger, config.packages, tracked, step, run)

    def _surroundings(self) -> dict[str, Any]:
        """Data, hardware and plan of the run."""
        setup, data, config = self.setup, self.setup.data, self.setup.config
        gpu = setup.accelerator == "gpu"
        card = (present_card() if gpu else None) or cpu_card(setup.processes)
        try:
            plan = json.loads(
                as_json(make_plan(config, card, data.split.ranks, data.vocabulary or 0, gpu), config, None)
            )
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
                "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
                "ranks": data.split.ranks,
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
            },
            "plan": plan,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trackers is None:
            return
        for name in self._trackers.close(self.patience):
            path: Path = self.setup.directory.path
            self.setup.console.print(
                f"logger={name} has not taken all rows within {self.patience:g} s and was ended; "
                f"`rwkv-train report {path} --push {name}` sends them again"
            )
