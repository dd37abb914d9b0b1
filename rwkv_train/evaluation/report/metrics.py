"""metrics.jsonl as columns: read as fast as it can be, and only what is new when it is read again."""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LISTS = 400  # rows with values of each layer that are kept, evenly spaced: a curve of them has no spikes to lose
_NOT_FINITE = re.compile(rb"(?<=[\s:,\[])-?(?:NaN|Infinity)(?=[\s,\]}])")


class Column(NamedTuple):
    """A key's values, where it has one."""

    steps: Ints  # (N,), increasing
    values: Floats  # (N,), or (N, …) for the values of each layer; all finite, but those of layers


class Metrics:
    """The columns of a metrics.jsonl that may still grow.

    Attributes:
        columns: by key.
        unreadable: lines that are no JSON object with a step; a torn last line is not one of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_anew()

    def _start_anew(self) -> None:
        self.columns: dict[str, Column] = {}
        self.unreadable, self._read, self._file = 0, 0, 0

    def refresh(self) -> bool:
        """Reads what was written since; whether there was anything.

        A file that has become shorter or was replaced is read from its beginning.
        """
        try:
            with open(self.path, "rb") as file:
                status = self.path.stat()
                anew = status.st_size < self._read or status.st_ino != self._file
                if anew:
                    self._start_anew()
                self._file = status.st_ino
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            changed = bool(self.columns)
            self._start_anew()
            return changed
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        if whole:
            for key, column in self._parse(whole).items():
                self.columns[key] = _behind(self.columns[key], column) if key in self.columns else column
        return bool(whole) or anew

    def _parse(self, lines: bytes) -> dict[str, Column]:
        """Lines → columns; line by line where a single one of them cannot be read."""
        import pyarrow as pa
        import pyarrow.json

        if b"NaN" in lines or b"Infinity" in lines:
            lines = _NOT_FINITE.sub(b"null", lines)
        try:
            table = pyarrow.json.read_json(BytesIO(lines))
            names, columns = table.column_names, [column.combine_chunks() for column in table.columns]
        except pa.ArrowInvalid:
            rows = [row for line in lines.split(b"\n") if line.strip() and (row := self._row(line)) is not None]
            names = list({key: None for row in rows for key in row})
            columns = [_array([row.get(key) for row in rows]) for key in names]
        found = dict(zip(names, columns, strict=True))
        if "step" not in found or not (
            pa.types.is_integer(found["step"].type) or pa.types.is_floating(found["step"].type)
        ):
            self.unreadable += len(lines.split(b"\n")) - 1
            return {}
        steps = found.pop("step").to_numpy(zero_copy_only=False)
        made = {key: _column(steps, array) for key, array in found.items() if array is not None}
        return {key: column for key, column in made.items() if column is not None}

    def _row(self, line: bytes) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
        self.unreadable += 1
        return None


def _array(values: list[Any]) -> Any:
    """As Arrow has it; None: no kind fits all of them."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _column(steps: npt.NDArray[Any], array: Any) -> Column | None:
    """The values of a key; None where they are no numbers."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
        kept = np.isfinite(values) & np.isfinite(steps)
        return _in_order(steps[kept].astype(np.int64), values[kept])
    if pa.types.is_list(kind):
        there = np.flatnonzero(np.asarray(array.is_valid()) & np.isfinite(steps))
        there = there[np.unique(np.linspace(0, len(there) - 1, _LISTS).astype(int))] if len(there) > _LISTS else there
        try:
            values = np.array(array.take(pa.array(there)).to_pylist(), np.float64)  # None becomes NaN
        except (ValueError, TypeError):  # ragged, or no numbers
            return None
        return _in_order(steps[there].astype(np.int64), values) if values.size else None
    return None


def _in_order(steps: Ints, values: Floats) -> Column:
    """Increasing steps; of those that are there twice, the later row counts."""
    if len(steps) > 1 and not np.all(steps[1:] > steps[:-1]):
        steps, last = np.unique(steps[::-1], return_index=True)
        values = values[::-1][last]
    return Column(steps, values)


def _behind(before: Column, after: Column) -> Column:
    if before.values.shape[1:] != after.values.shape[1:]:
        return after
    steps, values = (np.concatenate(parts) for parts in zip(before, after, strict=True))
    return _in_order(steps, values)
