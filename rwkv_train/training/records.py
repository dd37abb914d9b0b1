"""The run's own records: JSON lines that only grow, cut back to the checkpoint on resume; and what the disk refused."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Refusals:
    """Writes that the disk refused: each is told at once, loudly, and costs no more than what it would have written."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def outlived(self, path: Path) -> Iterator[None]:
        """Tells an OSError of the block, counts it, and goes on behind the block."""
        try:
            yield
        except OSError as error:
            self.tell(path, error)

    def tell(self, path: Path, error: OSError) -> None:
        self.count += 1
        print(f"\nWARNING: {path} could not be written: {error.strerror or error}; the run goes on", file=sys.stderr)


class JsonLines:
    """A file of one JSON object per line. Rows that a full disk refuses wait, and are written with the next ones.

    Args:
        path: the file; made when the first row comes.
        enabled: False on all ranks but the first: nothing is written.
    """

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled
        self._waiting: list[str] = []

    @property
    def lost(self) -> int:
        """Rows that are not in the file."""
        return len(self._waiting)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row and hands it to the operating system, so that a killed process loses none."""
        if not self.enabled:
            return
        self._waiting.append(json.dumps(row) + "\n")
        try:
            with open(self.path, "ab", buffering=0) as file:
                end, wanted = file.tell(), "".join(self._waiting).encode()
                if file.write(wanted) < len(wanted):  # a disk that is nearly full takes a part: no torn line stays
                    os.truncate(self.path, end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting.clear()
        except OSError as error:
            if self.lost == 1:
                print(
                    f"\nWARNING: {self.path} could not be written: {error.strerror}; the run goes on, its rows wait",
                    file=sys.stderr,
                )

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows, those that wait too; a last line that a kill left torn is not one."""
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.exists() else []
        return [json.loads(line) for line in [*lines, *self._waiting]]

    def cut(self, step: int) -> None:
        """Removes the rows after a step (and a torn last line), so that a resumed run writes each step once."""
        if not self.enabled or not self.path.exists():
            return
        kept = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
        os.truncate(self.path, kept)  # in place: this needs no room on the disk


class Events(JsonLines):
    """What happened to the run: started, resumed, checkpoint, finished …, with step and wall-clock time."""

    def add(self, event: str, step: int, **details: Any) -> None:
        self.append({"time": round(time.time(), 3), "event": event, "step": step, **details})
