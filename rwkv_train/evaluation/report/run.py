"""A run's directory as it is found: finished, running, half written, or empty."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rwkv_train.config.schema import flatten
from rwkv_train.errors import UserError
from rwkv_train.evaluation.report.metrics import Metrics

_SAMPLE = re.compile(r"^===== after (\d+) steps =====\n", re.MULTILINE)


class Run:
    """What a run left, read again with `refresh`.

    Attributes:
        name: for people; the directory's.
        metrics: metrics.jsonl.
        config: word → value of config.yaml; {} where there is none.
        events: rows of events.jsonl that have a step and a name, in their order.
        samples: (step, text) of samples.txt.
        evaluations: file name → content of eval*.json.
        notes: what could not be read, for people.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.resolve().name
        self.metrics = Metrics(path / "metrics.jsonl")
        self._seen: dict[str, tuple[int, int]] = {}
        self.config: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.samples: list[tuple[int, str]] = []
        self.evaluations: dict[str, Any] = {}
        self._notes: dict[str, str] = {}

    @property
    def notes(self) -> list[str]:
        bad = self.metrics.unreadable
        lines = [f"metrics.jsonl: {bad} lines are no rows; they are left out"] if bad else []
        return [*lines, *self._notes.values()]

    @property
    def last_step(self) -> int:
        columns = self.metrics.columns.values()
        return max((int(column.steps[-1]) for column in columns if len(column.steps)), default=0)

    def refresh(self) -> bool:
        """Reads what has changed; whether anything had."""
        changed = self.metrics.refresh()
        readers = {"config.yaml": self._config, "events.jsonl": self._events, "samples.txt": self._samples}
        readers |= {path.name: self._evaluation for path in sorted(self.path.glob("eval*.json"))}
        for name, read in readers.items():
            try:
                status = (self.path / name).stat()
            except FileNotFoundError:
                continue
            seen = (status.st_size, status.st_mtime_ns)
            if self._seen.get(name) != seen:
                self._seen[name], changed = seen, True
                self._notes.pop(name, None)
                try:
                    read(name, (self.path / name).read_text(encoding="utf-8", errors="replace"))
                except (OSError, ValueError) as error:
                    self._notes[name] = f"{name} cannot be read: {str(error).splitlines()[0]}"
        return changed

    def _config(self, name: str, text: str) -> None:
        import yaml

        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
        self.config = flatten(tree) if isinstance(tree, dict) else {}

    def _events(self, name: str, text: str) -> None:
        rows, bad = [], 0
        for line in text.split("\n")[:-1]:  # a last line without an end is still being written
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("event"), str):
                rows.append(row)
            else:
                bad += 1
        self.events = rows
        if bad:
            self._notes[name] = f"{name}: {bad} lines are no events; they are left out"

    def _samples(self, name: str, text: str) -> None:
        parts = _SAMPLE.split(text)
        self.samples = [(int(step), body.rstrip("\n")) for step, body in zip(parts[1::2], parts[2::2], strict=True)]

    def _evaluation(self, name: str, text: str) -> None:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        self.evaluations[name] = content


def open_runs(paths: list[Path], wait: bool = False) -> list[Run]:
    """The runs of these directories, read; two of one name get their parent's too.

    Args:
        paths: of run directories.
        wait: whether a run that has written nothing yet is shown all the same.

    Raises:
        UserError: one is no run's directory, or there is nothing in it to show.
    """
    runs = []
    for path in paths:
        if not path.is_dir():
            near = [child.name for child in path.parent.glob("*") if (child / "config.yaml").exists()]
            what = f"there is no directory {path}" if not path.exists() else f"{path} is a file"
            raise UserError(what, f"runs there: {', '.join(sorted(near)[:8])}" if near else "give a run's directory")
        inside = sorted(child.name for child in path.glob("*") if (child / "metrics.jsonl").exists())
        run = Run(path)
        run.refresh()
        if not run.metrics.columns and not wait:
            if inside:
                more = f"{path}/*" if len(inside) > 1 else f"{path}/{inside[0]}"
                raise UserError(f"{path} is no run's directory, it holds {len(inside)}: {', '.join(inside[:8])}", more)
            why = "has no metrics.jsonl" if not run.metrics.path.exists() else "has logged no step yet"
            way = "`report --live` waits for the first one" if run.config else "give a run's directory: runs/NAME"
            raise UserError(f"{path} {why}", way)
        runs.append(run)
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.path.resolve().parent.name}/{run.name}"
    return runs
