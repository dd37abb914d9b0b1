"""metrics.csv: all rows of metrics.jsonl as one table, for spreadsheets and pandas."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from rwkv_train.rundir.jsonl import MetricsRow
from rwkv_train.trackers import LocalTracker, TrackedRun, flat


class CSV(LocalTracker):
    """Writes the table when the run ends, however it ends.

    Args:
        path: path of the file; null: metrics.csv of the run directory.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._target = Path()

    def open(self, run: TrackedRun, step: int, rows: Callable[[], Sequence[MetricsRow]]) -> None:
        self._target = Path(self.path) if self.path else run.path / "metrics.csv"

    def close(self, rows: Callable[[], Sequence[MetricsRow]]) -> None:
        write_csv(rows(), self._target)


def write_csv(rows: Sequence[MetricsRow], path: Path) -> None:
    """Writes rows as a table with a column for each key that any of them has.

    Args:
        rows: of metrics.jsonl.
        path: path of the file, whose directory is made if necessary.
    """
    flattened = [dict(flat(row)) for row in rows]
    columns = list(dict.fromkeys(key for row in flattened for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flattened)
    temporary.replace(path)
