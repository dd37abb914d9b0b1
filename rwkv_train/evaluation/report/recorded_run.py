"""Reads the records in a run's directory, whether the run is finished, running, or has yet to write anything."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_train.config.schema import flatten
from rwkv_train.errors import UserError
from rwkv_train.evaluation.report.metrics_table import MetricsTable
from rwkv_train.json_files import MAX_BYTES, parse_json, read_regular, reason_of
from rwkv_train.rundir.record_lines import event_row

_SAMPLE_HEADING = re.compile(r"^===== after (\d+) steps =====\n", re.MULTILINE)

_GROWING = ("events.jsonl", "samples.txt")  # of a long run, which may have any size
_SOURCE_FIGURES = ("tokens", "nats_per_token", "perplexity", "bits_per_byte")


class RecordedRun:
    """The records of a run; `refresh` reads what has changed.

    Args:
        path: the run's directory.

    Attributes:
        name: name of the directory, or `open_runs`'s longer name.
        metrics: columns of metrics.jsonl.
        config: value of each setting in config.yaml, by dotted name; empty without that file.
        events: rows of events.jsonl that have a step and an event, in order.
        samples: step and text of each sample in samples.txt.
        evaluations: content of each eval*.json, by file name.
        notes: messages about records that could not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.resolve().name
        self.metrics = MetricsTable(path / "metrics.jsonl")
        self._file_states: dict[str, tuple[int, int]] = {}  # size and modification time
        self.config: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.samples: list[tuple[int, str]] = []
        self.evaluations: dict[str, Any] = {}
        self._notes: dict[str, str] = {}

    @property
    def notes(self) -> list[str]:
        bad = self.metrics.unreadable
        lines = [f"metrics.jsonl: left out {bad} lines that are not rows"] if bad else []
        return [*lines, *self._notes.values()]

    @property
    def last_step(self) -> int:
        """The last step with a metric; 0 if there is none."""
        columns = self.metrics.columns.values()
        return max((int(column.steps[-1]) for column in columns if len(column.steps)), default=0)

    def refresh(self) -> bool:
        """Reads the files that have changed since the last call; returns whether any has."""
        changed = self.metrics.refresh()
        readers = {"config.yaml": self._config, "events.jsonl": self._events, "samples.txt": self._samples}
        readers |= {path.name: self._evaluation for path in sorted(self.path.glob("eval*.json"))}
        for name, read in readers.items():
            try:
                status = (self.path / name).stat()
            except OSError:
                continue
            file_state = (status.st_size, status.st_mtime_ns)
            if self._file_states.get(name) != file_state:
                self._file_states[name], changed = file_state, True
                self._notes.pop(name, None)
                try:
                    limit = None if name in _GROWING else MAX_BYTES
                    read(name, read_regular(self.path / name, limit).decode("utf-8", "replace"))
                except (OSError, ValueError, RecursionError) as error:
                    self._notes[name] = f"{name} cannot be read: {reason_of(error)}"
        return changed

    def _config(self, name: str, text: str) -> None:
        import yaml

        try:
            tree = yaml.safe_load(text)
        except (yaml.YAMLError, ArithmeticError, TypeError, AttributeError) as error:  # of values such as dates, too
            raise ValueError(str(error)) from None
        plain = parse_json(json.dumps(flatten(tree), default=str)) if isinstance(tree, dict) else {}
        self.config = dict(plain)

    def _events(self, name: str, text: str) -> None:
        rows, bad = [], 0
        for line in text.split("\n")[:-1]:  # a last line without a newline is still being written
            if (row := event_row(line)) is not None:
                rows.append(row)
            else:
                bad += 1
        self.events = rows
        if bad:
            self._notes[name] = f"{name}: left out {bad} lines that are not events"

    def _samples(self, name: str, text: str) -> None:
        parts = _SAMPLE_HEADING.split(text)
        self.samples = [(int(step), body.rstrip("\n")) for step, body in zip(parts[1::2], parts[2::2], strict=True)]

    def _evaluation(self, name: str, text: str) -> None:
        self.evaluations.pop(name, None)
        content = parse_json(text)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        self.evaluations[name] = checked_evaluation(content)


def checked_evaluation(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of an evaluation.

    Raises:
        ValueError: a value is not of the type that it should have.
    """

    def number(value: Any, key: str) -> float | None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{key} is not a number")
        return value if value is None or abs(value) < 1e300 else None

    def each(value: Any, kind: type, key: str) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"{key} is not {'an object' if kind is dict else 'a list'}")
        return value

    def source(found: Any, key: str) -> dict[str, Any]:
        figures = {name: number(each(found, dict, key).get(name), name) for name in _SOURCE_FIGURES}
        bins = [each(one, dict, "by_position") for one in each(found.get("by_position") or [], list, "by_position")]
        lines = [{name: number(one.get(name), name) for name in ("to", "nats_per_token")} for one in bins]
        return {"name": str(found.get("name")), **figures, "by_position": lines}

    sources = [source(one, "sources") for one in each(content.get("sources") or [], list, "sources")]
    tasks = {}
    for task, metrics in each(content.get("tasks") or {}, dict, "tasks").items():
        figures = each(metrics, dict, f"tasks.{task}").items()
        tasks[task] = {key: one if isinstance(one, str) else number(one, key) for key, one in figures}
    everything = content.get("all")
    return {
        "step": number(content.get("step"), "step"),
        "sources": sources,
        "all": None if everything is None else source(everything, "all"),
        "tasks": tasks or None,
    }


def open_runs(paths: list[Path], wait: bool = False) -> list[RecordedRun]:
    """Reads runs; the names of runs with the same name get their parent directory's name as a prefix.

    Args:
        paths: run directories.
        wait: whether to accept runs that have written nothing yet.

    Raises:
        UserError: a path is not a run's directory, or the run has no metrics yet.
    """
    runs = []
    for path in paths:
        if not path.is_dir():
            near = [child.name for child in path.parent.glob("*") if (child / "config.yaml").exists()]
            what = f"there is no directory {path}" if not path.exists() else f"{path} is a file"
            raise UserError(
                what, f"runs there: {', '.join(sorted(near)[:8])}" if near else "give a run's directory: runs/NAME"
            )
        inside = sorted(child.name for child in path.glob("*") if (child / "metrics.jsonl").exists())
        run = RecordedRun(path)
        run.refresh()
        if not run.metrics.columns and not wait:
            if inside:
                more = f"{path}/*" if len(inside) > 1 else f"{path}/{inside[0]}"
                raise UserError(
                    f"{path} is not a run's directory, it contains {len(inside)}: {', '.join(inside[:8])}",
                    f"give {more}",
                )
            reason = "has no metrics.jsonl" if not run.metrics.path.exists() else "has logged no step yet"
            remedy = (
                "wait for the first one with `report --live`" if run.config else "give a run's directory: runs/NAME"
            )
            raise UserError(f"{path} {reason}", remedy)
        runs.append(run)
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.path.resolve().parent.name}/{run.name}"
    return runs
