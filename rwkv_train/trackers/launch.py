"""The training process's side of the trackers: local ones are called, the others get a process each."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from rwkv_train.config.values import convert
from rwkv_train.errors import UserError
from rwkv_train.instantiate import prepare
from rwkv_train.resources import resource
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.rundir.durable import write_state
from rwkv_train.rundir.jsonl import EventRow, Events, JsonLines, MetricsRow
from rwkv_train.trackers import LocalTracker, TrackedRun, read_state
from rwkv_train.trackers.follow import Follower, make

PUSHED_ARGUMENTS = {  # what `--push` takes from a run directory, which may be a stranger's: plain text, and no path
    "wandb": {"project": str, "group": str, "tags": tuple[str, ...], "notes": str, "name": str}
}
TRACKER_SECONDS = 30.0  # seconds that tracker processes have for the remaining rows when the run has ended


class LocalTrackers:
    """Local trackers in this process: an error of one costs a warning and that tracker, not the run.

    Args:
        trackers: entry of `logger` → tracker.
        run: the run.
        step: the step that it continues from; 0 for a new run.
        metrics: path of metrics.jsonl.
    """

    def __init__(self, trackers: Mapping[str, LocalTracker], run: TrackedRun, step: int, metrics: Path) -> None:
        self._trackers, self._run, self._metrics = dict(trackers), run, metrics
        self._call(lambda tracker: tracker.open(run, step, self._rows))

    def _rows(self) -> list[dict[str, Any]]:
        return JsonLines(self._metrics).rows()

    def row(self, row: MetricsRow) -> None:
        """Takes a row of metrics.jsonl."""
        self._call(lambda tracker: tracker.row(row))

    def event(self, event: EventRow) -> None:
        """Takes a row of events.jsonl."""
        self._call(lambda tracker: tracker.event(event))

    def close_local(self) -> None:
        self._call(lambda tracker: tracker.close(self._rows))
        self._trackers.clear()

    def _call(self, method: Callable[[LocalTracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                method(tracker)
            except Exception as error:  # code of other packages: whatever it raises, training continues
                del self._trackers[name]
                message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                print(
                    f"\nlogger={name}: {message}; training continues without it\n"
                    f"  later: rwkv-train report {self._run.path} --push {name}",
                    file=sys.stderr,
                    flush=True,
                )


class Trackers(LocalTrackers):
    """The trackers of a run, in this process and in processes of their own.

    Args:
        trees: entry of `logger` → its tree, already checked.
        packages: packages whose classes the trees may name.
        run: the run.
        step: the step that it continues from; 0 for a new run.
        directory: the run's directory, whose metrics.jsonl and events.jsonl the trackers read.
    """

    def __init__(
        self, trees: Mapping[str, Any], packages: Sequence[str], run: TrackedRun, step: int, directory: RunDirectory
    ) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        local: dict[str, LocalTracker] = {}
        settings = {
            "path": str(run.path),
            "run": run.name,
            "info": run.info,
            "changed": run.changed,
            "step": step,
            "rows": str(directory.metrics.absolute()),
            "events": str(directory.events.absolute()),
            "packages": list(packages),
        }
        for name, tree in trees.items():
            if _is_local(name, tree, packages):
                local[name] = cast(LocalTracker, make(name, tree, packages))
            else:
                _lower_sent(run.path / "trackers" / f"{name}.json", step)
                self._processes[name] = _start({**settings, "name": name, "tree": tree})
        super().__init__(local, run, step, directory.metrics)

    def close(self, seconds: float = TRACKER_SECONDS) -> list[str]:
        """Closes all trackers; the processes have so many seconds for the remaining rows.

        Returns:
            the names of those that were not done in time, and were killed.
        """
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        self.close_local()
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


def _is_local(name: str, tree: Mapping[str, Any], packages: Sequence[str]) -> bool:
    try:
        return bool(prepare("logger", {name: tree}, LocalTracker, packages))
    except UserError:  # it was checked that it is one or the other
        return False


def _start(settings: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """Starts the process of a tracker."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rwkv_train.trackers.follow"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the training process, which then ends this one
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, and reported why
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
    return process


def _lower_sent(notes: Path, step: int) -> None:
    """Notes that later steps will be repeated; done here because the tracker's process may be killed before it does."""
    with contextlib.suppress(OSError, ValueError):  # it cannot be read, which the tracker's process reports
        if state := read_state(notes):
            write_state(notes, {**state, "sent": min(state.get("sent", 0), step)})


def push(path: Path, name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Makes a tracker's copy of a run again, from metrics.jsonl and events.jsonl.

    Args:
        path: the run directory.
        name: name of the tracker.
        tree: `{"_target_": "rwkv_train.trackers.wandb.Wandb", …}`.

    Returns:
        the tracker's state: `sent`, the last step, and for W&B `id`.

    Raises:
        UserError: the run has no rows, or the tracker cannot be made.
        Exception: any exception of the tracker.
    """
    directory = RunDirectory(str(path.parent), path.name)
    rows = JsonLines(directory.metrics).rows()
    if not rows:
        raise UserError(f"{path} has no metrics.jsonl with a row", "name the directory of a run, such as runs/NAME")
    tracker, run = make(name, tree, ()), TrackedRun(path, path.name, {"config": _config(directory)})
    if isinstance(tracker, LocalTracker):
        tracker.open(run, 0, lambda: [])
        for event in Events(directory.events).rows():
            if event["event"] != "rewound":
                tracker.event(event)
        for row in rows:
            tracker.row(row)
        tracker.close(lambda: rows)
        return {"sent": rows[-1]["step"]}
    notes = path / "trackers" / f"pushed-{name}.json"
    notes.unlink(missing_ok=True)
    follower = Follower(tracker, run, 0, notes, directory.metrics, directory.events)
    follower.since = 0.0
    while follower.catch_up():
        pass
    follower.end()
    return tracker.state


def push_all(runs: Sequence[Path], name: str) -> int:
    """`rwkv-train report RUN_DIR … --push TRACKER`: exit code 0.

    The tracker is that of conf/logger. Of the arguments that the run was started with, it gets PUSHED_ARGUMENTS.
    """
    for path in runs:
        tree = yaml.safe_load((resource("conf") / "logger" / f"{name}.yaml").read_text(encoding="utf-8"))[name]
        own = _own_arguments(_config(RunDirectory(str(path.parent), path.name)), name)
        state = push(path, name, {**tree, **own})
        where = f", run {state['id']}" if "id" in state else ""
        print(f"{path}: {state['sent']} steps in {name}{where}")
    return 0


def _own_arguments(config: Any, name: str) -> dict[str, Any]:
    """The PUSHED_ARGUMENTS of a tracker in a config that was read from a file; other values are ignored."""
    for key in ("logger", name):
        config = config.get(key) if isinstance(config, Mapping) else None
    own = {}
    for argument, hint in PUSHED_ARGUMENTS.get(name, {}).items():
        with contextlib.suppress(ValueError):  # absent, or of another type
            value = convert(hint, config.get(argument) if isinstance(config, Mapping) else None)
            if "${" not in str(value):  # interpolations of a file are not resolved
                own[argument] = list(value) if isinstance(value, tuple) else value
    return own


def _config(run: RunDirectory) -> dict[str, Any]:
    return yaml.safe_load(run.config.read_text(encoding="utf-8")) or {} if run.config.exists() else {}
