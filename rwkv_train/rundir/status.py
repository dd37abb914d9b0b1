"""`rwkv-train status RUN_DIR …`: the state of runs, from their records alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from rwkv_train.console import ERROR_STYLE, make_console
from rwkv_train.errors import UserError
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.rundir.history import AttemptRecord, History
from rwkv_train.user_path import user_path

_WIDTH = 200  # characters per line where the output is not a terminal
_SILENT_AFTER = 600.0  # seconds without a record after which a run that has not ended is shown as silent


def status(paths: Sequence[Path]) -> int:
    """Prints the state of each run; of a single one also its attempts and where its time went.

    Returns:
        exit code: 1 if a run has given up or failed.

    Raises:
        UserError: there is no run at a path.
    """
    console = make_console()
    if not console.is_terminal:
        console.width = _WIDTH
    found = {path: _find(user_path(path)) for path in paths}
    table = Table("run", "state", "step", "tokens", "loss", "attempts", "goodput")
    for path, history in found.items():
        last = history.rows[-1] if history.rows else {}
        loss = f"{last['train/loss']:.4f}" if isinstance(last.get("train/loss"), float | int) else ""
        step = f"{history.reached:,}" + (f" of {total:,}" if (total := _total(user_path(path))) else "")
        table.add_row(
            str(path),
            _state(history),
            step,
            f"{last.get('tokens', 0):,}",
            loss,
            str(len(history.attempts)),
            f"{history.account().goodput:.0%}",
        )
    console.print(table)
    for path, history in found.items():
        for note in history.notes:
            console.print(f"{path}: {note}", style=ERROR_STYLE)
    if len(found) == 1:
        _print_attempts(next(iter(found.values())), console)
    return int(any(_state(history).startswith(("given up", "failed")) for history in found.values()))


def _find(path: Path) -> History:
    run = RunDirectory(str(path.parent), path.name)
    if not run.events.exists():
        near = sorted(str(child.parent) for child in path.glob("*/events.jsonl"))
        raise UserError(
            f"{path}: there is no run" if path.exists() else f"{path}: there is no such directory",
            f"a run's directory, such as {near[0]}" if near else "a run's directory, such as runs/NAME",
        )
    return History.read(run)


def _total(path: Path) -> int | None:
    """Total steps of the run; None: it has no budget, or its configuration cannot be read."""
    try:
        tree = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        budget, tokens = tree["budget"], tree["batch"]["tokens"]
        return budget["steps"] if budget["tokens"] is None else -(-int(budget["tokens"]) // int(tokens))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ArithmeticError, yaml.YAMLError):
        return None


def _state(history: History) -> str:
    if not history.attempts:
        return "not started"
    ended = history.attempts[-1].ended
    if ended == "given_up":
        return f"given up at step {history.reached}"
    if ended != "killed":
        return ended.replace("_", " ")
    silent = time.time() - history.alive
    return "running" if silent < _SILENT_AFTER else f"silent for {_span(silent)}"


def _print_attempts(history: History, console: Console) -> None:
    """Prints a line for each attempt, and where the time went."""
    console.print()
    for number, attempt in enumerate(history.attempts, 1):
        first = attempt.events[0]
        after = history.attempts[number] if number < len(history.attempts) else None
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(first["time"])))
        reached = history.reached if after is None else after.reached
        line = f"{began}  steps {first['step']} to {reached}  {_ended(attempt, history if after is None else None)}"
        if after is not None and (lost := after.events[0]).get("steps_lost"):
            line += f"; {lost['steps_lost']} steps repeated, {_span(float(lost['seconds_lost']))}"
        if "seconds_down" in first:
            line += f"; restarted after {_span(float(first['seconds_down']))}"
        console.print(line)
    account = history.account()
    console.print(
        f"\ngoodput {account.goodput:.1%}: {_span(account.productive)} in steps of the run, of {_span(account.wall)}"
    )
    for cause, seconds in account.lost.items():
        if seconds >= 0.05:
            console.print(f"  {_span(seconds):>10}  {seconds / account.wall:6.1%}  {cause}")


def _ended(attempt: AttemptRecord, newest: History | None) -> str:
    """How an attempt ended, with the reason; `newest` is the history if it is the last attempt."""
    if newest is not None and attempt.ended == "killed":
        return _state(newest)
    rows = [row for row in attempt.events if row["event"] == attempt.ended or "reason" in row or "signal" in row]
    why = next((row[key] for row in reversed(rows) for key in ("reason", "signal") if key in row), "")
    how = attempt.ended.replace("_", " ")
    return f"{how} ({why})" if why and attempt.ended not in ("finished", "stopped") else how


def _span(seconds: float) -> str:
    """A duration with a fitting unit."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
