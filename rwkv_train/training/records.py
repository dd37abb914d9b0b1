"""The run's own records: JSON lines that only grow, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of one JSON object per line. A disk that is full is said once, loudly; training goes on.

    Args:
        path: the file; made when the first row comes.
        enabled: False on all ranks but the first: nothing is written.
    """

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path, self.enabled, self.lost = path, enabled, 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row and hands it to the operating system, so that a killed process loses none."""
        if not self.enabled:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            if not self.lost:
                print(f"warning: {self.path} cannot be written ({error.strerror}); training goes on", file=sys.stderr)
            self.lost += 1

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; a last line that a kill left torn is not one."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def cut(self, step: int) -> None:
        """Removes the rows after a step (and a torn last line), so that a resumed run writes each step once."""
        if not self.enabled or not self.path.exists():
            return
        kept = [row for row in self.rows() if row["step"] <= step]
        aside = self.path.with_name(f".{self.path.name}")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        aside.replace(self.path)


class Events(JsonLines):
    """What happened to the run: started, resumed, checkpoint, finished …, with step and wall-clock time."""

    def add(self, event: str, step: int, **details: Any) -> None:
        self.append({"time": round(time.time(), 3), "event": event, "step": step, **details})
