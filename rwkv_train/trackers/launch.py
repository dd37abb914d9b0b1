"""The training process's side of the trackers: starts a process for each, and does not wait for it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rwkv_train.errors import UserError
from rwkv_train.resources import resource
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.trackers import Run
from rwkv_train.trackers.follow import Follower, make

PATIENCE = 30.0  # seconds that trackers have for what is left when the run is over


class Processes:
    """The processes of a run's trackers; none where nothing is asked for.

    Args:
        trees: entry of `logger` → its tree, found right before.
        packages: whose classes the trees may name.
        told: what a tracker's process needs beside its tree.
    """

    def __init__(self, trees: Mapping[str, Any], packages: Sequence[str], told: Mapping[str, Any]) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name, tree in trees.items():
            _lower(Path(told["path"]) / "trackers" / f"{name}.json", told["step"])
            process = subprocess.Popen(
                [sys.executable, "-m", "rwkv_train.trackers.follow"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the training, which then ends this one
            )
            self._processes[name] = process
            line = {**told, "name": name, "tree": tree, "packages": list(packages)}
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended, and said why
                process.stdin.write(json.dumps(line).encode() + b"\n")
                process.stdin.flush()

    def close(self, seconds: float = PATIENCE) -> list[str]:
        """Lets them hand over what is left; the names of those that did not do so in time, and are ended."""
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        late, end = [], time.monotonic() + seconds
        for name, process in self._processes.items():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(name)
                process.kill()
                process.wait()
        self._processes = {}
        return late


def _lower(notes: Path, step: int) -> None:
    """Notes that what is behind a step will be done again, before a process can be killed that has not begun."""
    with contextlib.suppress(OSError, ValueError):  # none yet
        state = json.loads(notes.read_text())
        aside = notes.with_name(f".{notes.name}")
        aside.write_text(json.dumps({**state, "sent": min(state.get("sent", 0), step)}))
        aside.replace(notes)


def push(path: Path, name: str, tree: Mapping[str, Any], packages: Sequence[str] = ()) -> dict[str, Any]:
    """Makes a tracker's copy of a run anew, from metrics.jsonl and events.jsonl.

    Args:
        path: the run directory.
        name: of the tracker, for its notes.
        tree: `{"_target_": "rwkv_train.trackers.wandb.Wandb", …}`.
        packages: whose classes the tree may name.

    Returns:
        the tracker's state: for W&B `id`, for all `sent`, the last step.

    Raises:
        UserError: the run has no rows, or the tracker cannot be made.
        Exception: whatever the tracker raises.
    """
    run = RunDirectory(str(path.parent), path.name)
    if not run.metrics.exists() or not run.metrics.stat().st_size:
        raise UserError(f"{path} has no metrics.jsonl with a row", "name the directory of a run, such as runs/NAME")
    notes = path / "trackers" / f"pushed-{name}.json"
    notes.unlink(missing_ok=True)
    tracker = make(name, tree, packages)
    follower = Follower(tracker, Run(path, path.name, {"config": _config(run)}), 0, notes, run.metrics, run.events)
    follower.since = 0.0
    while follower.catch_up():
        pass
    follower.end()
    return tracker.state


def push_all(runs: Sequence[Path], name: str) -> int:
    """`rwkv-train report RUN_DIR … --push TRACKER`: exit code 0.

    The tracker is the one of conf/logger; of its arguments those count that a run was started with.
    """
    for path in runs:
        tree = yaml.safe_load((resource("conf") / "logger" / f"{name}.yaml").read_text(encoding="utf-8"))[name]
        own = (_config(RunDirectory(str(path.parent), path.name)).get("logger") or {}).get(name) or {}
        state = push(path, name, {**tree, **{key: own[key] for key in tree.keys() & own.keys() if key != "_target_"}})
        where = f", run {state['id']}" if "id" in state else ""
        print(f"{path}: {state['sent']} steps in {name}{where}")
    return 0


def _config(run: RunDirectory) -> dict[str, Any]:
    return yaml.safe_load(run.config.read_text(encoding="utf-8")) or {} if run.config.exists() else {}
