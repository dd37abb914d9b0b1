"""Weights & Biases: the rows of metrics.jsonl on the axes step, tokens and hours."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

from rwkv_train.checkpoint.name import CheckpointName, checkpoints_below
from rwkv_train.rundir.jsonl import EventRow, MetricsRow
from rwkv_train.trackers import REPORTED_EVENTS, TrackedRun, Tracker, flat, text_of

INIT_TIMEOUT = 60  # seconds that wandb.init may take before the run is written offline


class Wandb(Tracker):
    """One run directory is one run of W&B, however often it is resumed: its id is kept in the run directory.

    The file is trackers/NAME.json, where NAME is the entry of `logger`: trackers/wandb.json. It also holds the path and
    the inode of the directory: a copy of it becomes another run of W&B.

    `step` is logged as a value of ours; wandb's own step cannot decrease, and restarts at 0 offline. Rows sent before a
    kill may be lost, so the next process sends again what is not certainly stored, and the last value of a step counts.
    Online, the server reports what it has. A run that is rewound, or resumed with other settings, becomes a new branch:
    another run of W&B with all its rows; the old one keeps the abandoned rows and is tagged.

    Args:
        project, group, tags, notes, entity: arguments of wandb.init.
        mode: online, offline or disabled; null: the value of WANDB_MODE, else online.
        name: name in W&B; null: the run's.
        artifacts: weights: upload the final weights; checkpoints: upload each checkpoint too; null: nothing.
    """

    def __init__(
        self,
        project: str = "rwkv_train",
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        entity: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        name: str | None = None,
        artifacts: Literal["weights", "checkpoints"] | None = None,
    ) -> None:
        self.project, self.group, self.tags, self.notes, self.entity = project, group, list(tags or []), notes, entity
        self.mode, self.name, self.artifacts = mode, name, artifacts
        self.state: dict[str, Any] = {}
        self._run: Any = None
        self._last = 0

    def begin(self, run: TrackedRun, step: int) -> int:
        self._source = run
        self._own_id(run.path)
        diverged = self.state.get("reached", 0) > step and run.changed
        if diverged:
            self._begin_branch()
        self._open()
        if diverged:
            return 0
        stored = self._run.summary.get("step") if self._run.resumed else None  # by the server
        return min(step, self.state.get("sent", 0)) if stored is None else int(stored)

    def _own_id(self, directory: Path) -> None:
        """Takes the id of the run directory; a new one in a copy of another directory, which keeps it.

        A directory is known by its inode: a moved one has the same, a copy has not.
        """
        path, inode = directory.resolve(), directory.stat().st_ino
        original, known = Path(self.state.get("path", path)), self.state.get("inode", inode)
        if inode != known:
            id_ = self.state.get("id")
            if original != path and _inode(original) == known:
                self.state.clear()
                text = f"{path} is a copy of {original}, which keeps its W&B run {id_}; this one is a new run of W&B"
            else:
                text = (
                    f"{path} goes on as W&B run {id_} of {original}, which is not there any more; if it is a copy of a "
                    f"run that goes on elsewhere, delete {path}/trackers/*.json before the next start"
                )
            print(f"\nlogger=wandb: {text}", file=sys.stderr, flush=True)
        self.state.setdefault("id", token_hex(4))
        self.state.update(path=str(path), inode=inode)

    def back(self, step: int) -> int:
        with contextlib.suppress(Exception):  # the abandoned run
            self._run.tags = (*self._run.tags, f"left at step {step}")
            self._run.finish()
        self._begin_branch()
        self._open()
        return 0

    @property
    def _branch(self) -> int:
        """1, and one more each time that the run has diverged: the number after the id's dash."""
        return int(self.state["id"].partition("-")[2] or 1)

    def _begin_branch(self) -> None:
        """Takes the id of a new run of W&B."""
        self.state["id"] = f"{self.state['id'].partition('-')[0]}-{self._branch + 1}"
        self.state["sent"] = self.state["reached"] = 0

    def _open(self) -> None:
        import wandb

        branch = self._branch
        arguments: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "group": self.group or (self._source.name if branch > 1 else None),
            "tags": self.tags,
            "notes": self.notes,
            "name": (self.name or self._source.name) + (f"-{branch}" if branch > 1 else ""),
            "id": self.state["id"],
            "resume": "allow",
            "dir": str(self._source.path),
            "config": dict(self._source.info),
            "allow_val_change": True,
        }
        settings: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "init_timeout": INIT_TIMEOUT,
            "x_stats_pid": os.getppid(),
        }
        try:
            self._run = wandb.init(mode=self.mode, settings=wandb.Settings(**settings), **arguments)
        except wandb.Error as error:  # no key, no network, a server that refuses
            reason = str(error).splitlines()[0]
            print(
                f"\nlogger=wandb: {reason}; the run is written offline\n"
                f"  later: wandb sync {self._source.path}/wandb/offline-run-*",
                file=sys.stderr,
                flush=True,
            )
            self._run = wandb.init(mode="offline", settings=wandb.Settings(**settings), **arguments)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("tokens", step_metric="step")
        self._run.define_metric("hours", step_metric="step")

    def row(self, row: MetricsRow) -> None:
        self._last = row["step"]
        self._run.log(dict(flat(row)))

    def event(self, event: EventRow) -> None:
        kind = event["event"]
        if kind in REPORTED_EVENTS:
            self._run.alert(title=f"{self._source.name}: {kind}", text=text_of(event), level="WARN")
        elif kind == "checkpoint" and self.artifacts == "checkpoints":
            saved = [
                path for path in checkpoints_below(self._source.path) if CheckpointName.of(path).step == event["step"]
            ]
            for path in saved[-1:]:
                self._attach("checkpoint", path, event["step"])
        elif kind == "finished" and self.artifacts is not None:
            self._attach("weights", self._source.path / "weights.pth", event["step"])

    def _attach(self, kind: str, path: Path, step: int) -> None:
        import wandb

        if not path.exists():  # deleted meanwhile, or the disk refused it
            return
        artifact = wandb.Artifact(f"{self._source.name}-{kind}", type="model", metadata={"step": step})
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def flush(self) -> None:
        self.state["reached"] = max(self._last, self.state.get("reached", 0))

    def end(self) -> None:
        self._run.finish()  # only after this all rows are on the disk or at the server
        self.state["sent"] = self.state["reached"] = self._last


def _inode(path: Path) -> int | None:
    """The inode of a directory; None where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return None
