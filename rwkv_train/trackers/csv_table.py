"""metrics.csv: all rows of metrics.jsonl as one table, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from rwkv_train.errors import UserError
from rwkv_train.rundir.jsonl import MetricsRow
from rwkv_train.trackers import LocalTracker, TrackedRun, flat


class CSV(LocalTracker):
    """Writes the table when the run ends, however it ends.

    Args:
        path: path of the file; null: metrics.csv of the run directory. A file that is no such table is never replaced.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._target = Path()

    def open(self, run: TrackedRun, step: int, rows: Callable[[], Sequence[MetricsRow]]) -> None:
        self._target = Path(self.path) if self.path else run.path / "metrics.csv"
        refuse_other_file(self._target)

    def close(self, rows: Callable[[], Sequence[MetricsRow]]) -> None:
        write_csv(rows(), self._target)


def write_csv(rows: Sequence[MetricsRow], path: Path) -> None:
    """Writes rows as a table with a column for each key that any of them has.

    Args:
        rows: of metrics.jsonl.
        path: path of the file, whose directory is made if necessary.

    Raises:
        UserError: there is a file that is no such table.
    """
    refuse_other_file(path)
    flattened = [dict(flat(row)) for row in rows]
    columns = list(dict.fromkeys(key for row in flattened for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    with open(temporary, "x", newline="", encoding="utf-8") as file:  # x: never through a link
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flattened)
    temporary.replace(path)


def refuse_other_file(path: Path) -> None:
    """Checks that writing the table to `path` would replace nothing but such a table.

    Raises:
        UserError: something else is there.
        OSError: it cannot be read.
    """
    if not os.path.lexists(path):
        return
    header = b"?"
    if stat.S_ISREG(path.lstat().st_mode):
        with open(path, "rb") as file:
            header = file.readline(1 << 16).strip()
    if header and header.partition(b",")[0] != b"step":
        raise UserError(f"{path} exists and is no table of metrics", "remove it, or logger.csv.path=FILE")
