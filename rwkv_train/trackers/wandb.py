"""Weights & Biases: a run of metrics.jsonl on the axes step, tokens and hours."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

from rwkv_train.trackers import TOLD, Row, Run, Tracker, flat, text_of

SECONDS = 60  # that wandb.init may take before the run goes on offline


class Wandb(Tracker):
    """The run's id is kept in the run directory: one run there is one run here, however often it was resumed.

    Steps are values of our own, never wandb's: its own step cannot go back, and starts anew offline. What was sent
    before a kill may be lost, so a process that goes on sends again what it does not know to be there: the last one
    counts. Online, the server says what it has. A run that goes back and then goes another way (rewound, or resumed
    with other settings) gets a new id and all its rows; the old one keeps what was left, and a tag that says so.

    Args:
        project, group, tags, notes, entity: as wandb.init has them.
        mode: online, offline or disabled; null: as WANDB_MODE says.
        name: null: the run's.
        artifacts: weights: the final ones; checkpoints: each of them; null: none.
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

    def begin(self, run: Run, step: int) -> int:
        self._of = run
        self.state.setdefault("id", token_hex(4))
        reached, first = self.state.get("reached", 0), self.state.get("ways", 1)
        if reached > step and run.changed:
            self._another_way()
        self._open()
        if self.state.get("ways", 1) != first:
            return 0
        there = self._run.summary.get("step") if self._run.resumed else None  # what the server has
        return min(step, self.state.get("sent", 0)) if there is None else int(there)

    def back(self, step: int) -> int:
        with contextlib.suppress(Exception):  # it is the past
            self._run.tags = (*self._run.tags, f"left at step {step}")
            self._run.finish()
        self._another_way()
        self._open()
        return 0

    def _another_way(self) -> None:
        self.state["ways"] = self.state.get("ways", 1) + 1
        self.state["id"] = f"{self.state['id'].split('-')[0]}-{self.state['ways']}"
        self.state["sent"] = self.state["reached"] = 0

    def _open(self) -> None:
        import wandb

        ways = self.state.get("ways", 1)
        arguments: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "group": self.group or (self._of.name if ways > 1 else None),
            "tags": self.tags,
            "notes": self.notes,
            "name": (self.name or self._of.name) + (f"-{ways}" if ways > 1 else ""),
            "id": self.state["id"],
            "resume": "allow",
            "dir": str(self._of.path),
            "config": dict(self._of.info),
            "allow_val_change": True,
        }
        settings: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "init_timeout": SECONDS,
            "x_stats_pid": os.getppid(),
        }
        try:
            self._run = wandb.init(mode=self.mode, settings=wandb.Settings(**settings), **arguments)
        except wandb.Error as error:  # no key, no network, a server that refuses
            reason = str(error).splitlines()[0]
            print(
                f"\nlogger=wandb: {reason}; the run is written offline\n"
                f"  later: wandb sync {self._of.path}/wandb/offline-run-*",
                file=sys.stderr,
                flush=True,
            )
            self._run = wandb.init(mode="offline", settings=wandb.Settings(**settings), **arguments)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("tokens", step_metric="step")
        self._run.define_metric("hours", step_metric="step")

    def row(self, row: Row) -> None:
        self._last = row["step"]
        self._run.log(dict(flat(row)))

    def event(self, event: Row) -> None:
        kind = event["event"]
        if kind in TOLD:
            self._run.alert(title=f"{self._of.name}: {kind}", text=text_of(event), level="WARN")
        elif kind == "checkpoint" and self.artifacts == "checkpoints":
            for path in sorted(self._of.path.glob(f"checkpoints/step_{event['step']:09d}*"))[-1:]:
                self._attach("checkpoint", path, event["step"])
        elif kind == "finished" and self.artifacts is not None:
            self._attach("weights", self._of.path / "weights.pth", event["step"])

    def _attach(self, kind: str, path: Path, step: int) -> None:
        import wandb

        if not path.exists():  # deleted already, or the disk refused it
            return
        artifact = wandb.Artifact(f"{self._of.name}-{kind}", type="model", metadata={"step": step})
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def flush(self) -> None:
        self.state["reached"] = max(self._last, self.state.get("reached", 0))

    def end(self) -> None:
        self._run.finish()  # only now all rows are on the disk or at the server
        self.state["sent"] = self.state["reached"] = self._last
