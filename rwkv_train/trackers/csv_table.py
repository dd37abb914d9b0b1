"""One table of all rows, metrics.csv: for spreadsheets and pandas."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from rwkv_train.trackers import Row, Run, Tracker, flat


class CSV(Tracker):
    """A column for each key. A key that comes for the first time makes the file anew.

    Args:
        path: of the file; null: metrics.csv of the run directory.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.state: dict[str, Any] = {}
        self._columns: list[str] = []
        self._rows: list[dict[str, float]] = []  # since the last flush

    def begin(self, run: Run, step: int) -> int:
        self._target = Path(self.path) if self.path else run.path / "metrics.csv"
        self._target.parent.mkdir(parents=True, exist_ok=True)
        return self.back(step)

    def back(self, step: int) -> int:
        self._columns, self._rows = [], []
        self._target.unlink(missing_ok=True)
        return 0  # all of them: they are few bytes

    def row(self, row: Row) -> None:
        self._rows.append(dict(flat(row)))

    def event(self, event: Row) -> None:
        """Events have no column."""

    def end(self) -> None:
        """Nothing is open."""

    def flush(self) -> None:
        new = [key for row in self._rows for key in row if key not in self._columns]
        if new:
            self._columns = list(dict.fromkeys([*self._columns, *new]))
            self._rewrite()
        with open(self._target, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerows(self._rows)
        if self._rows:
            self.state["sent"] = self.state["reached"] = int(self._rows[-1]["step"])
        self._rows = []

    def _rewrite(self) -> None:
        """Gives the rows that are there the new columns."""
        aside = self._target.with_name(f".{self._target.name}")
        with open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            if self._target.exists():
                with open(self._target, newline="", encoding="utf-8") as before:
                    writer.writerows(csv.DictReader(before))
        os.replace(aside, self._target)
