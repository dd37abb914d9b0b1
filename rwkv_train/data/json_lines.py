"""Local JSON Lines files as a data set with a position, in which a damaged line costs that line only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv_train.data.formats import format_of, open_decompressed

_SKIPPED_AT_ONCE = 2**24  # bytes of a compressed file


class JsonLines:
    """The rows of files, in the order of the files, with the interface of an IterableDataset that the stream uses.

    Args:
        files: paths, whose names may end in .gz or .zst.

    Attributes:
        where: file and line of the row that was read last.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files, self.where = tuple(files), ""
        self._file, self._byte, self._line = 0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The position behind the row that was read last."""
        return {"file": self._file, "byte": self._byte, "line": self._line}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets the next iteration begin at a position."""
        self._file, self._byte, self._line = state["file"], state["byte"], state["line"]

    def __iter__(self) -> Iterator[dict[str, Any] | str]:
        """Yields each row: its object, or what is wrong with it.

        Raises:
            OSError: a file cannot be read.
        """
        while self._file < len(self.files):
            path = Path(self.files[self._file])
            compression = format_of(path).compression
            with open_decompressed(path, compression) as file:
                if compression:
                    for begin in range(0, self._byte, _SKIPPED_AT_ONCE):
                        file.read(min(_SKIPPED_AT_ONCE, self._byte - begin))
                else:
                    file.seek(self._byte)
                while line := file.readline():
                    self._byte += len(line)
                    self._line += 1
                    self.where = f"{path}, line {self._line}"
                    if line.strip():
                        yield parsed_row(line)
            self._file, self._byte, self._line = self._file + 1, 0, 0


def parsed_row(line: bytes) -> dict[str, Any] | str:
    """The object of a line of JSON, or what is wrong with it."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    return row if isinstance(row, dict) else "not an object"
