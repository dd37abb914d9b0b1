"""metrics.jsonl as columns, read incrementally by Arrow; and long columns reduced to what a chart can show."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.data.arrays import Floats, Ints
from rwkv_train.json_files import open_regular, parse_json

_MAX_LAYER_ROWS = 400  # kept of values per layer, evenly spaced: unlike a loss they have no spikes that matter
_MAX_OPENED = 2000  # brackets in a line that Arrow reads; a row of a model with 100 layers has some hundreds
_MAX_STEP = 2**53
_NOT_FINITE = re.compile(rb"(?<=[\s:,\[])-?(?:NaN|Infinity)(?=[\s,\]}])")


class MetricColumn(NamedTuple):
    """The values of one key.

    Attributes:
        steps: steps at which the key has a value, increasing, int64 (N,).
        values: the values, finite float64 (N,); or (N, …) for values per layer, where NaN means a missing one.
    """

    steps: Ints
    values: Floats


class MetricsTable:
    """The columns of a metrics.jsonl file that may still grow.

    Args:
        path: the file; it may be missing.

    Attributes:
        columns: the columns read so far, by key.
        unreadable: number of lines that are not a JSON object with a step; an incomplete last line is not counted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reset()

    def _reset(self) -> None:
        self.columns: dict[str, MetricColumn] = {}
        self.unreadable, self._bytes_read, self._inode = 0, 0, 0

    def refresh(self) -> bool:
        """Reads the lines written since the last call, or all lines if the file was truncated or replaced.

        Returns:
            Whether the columns may have changed.
        """
        try:
            with open_regular(self.path) as file:
                status = self.path.stat()
                replaced = status.st_size < self._bytes_read or status.st_ino != self._inode
                if replaced:
                    self._reset()
                self._inode = status.st_ino
                file.seek(self._bytes_read)
                content = file.read()
        except (OSError, ValueError):
            changed = bool(self.columns)
            self._reset()
            return changed
        lines = content[: content.rfind(b"\n") + 1]  # without an incomplete last line
        self._bytes_read += len(lines)
        if lines:
            for key, column in self._parse(lines).items():
                self.columns[key] = _append(self.columns[key], column) if key in self.columns else column
        return bool(lines) or replaced

    def _parse(self, lines: bytes) -> dict[str, MetricColumn]:
        """Parses complete lines into columns; one line at a time if Arrow rejects any of them."""
        import pyarrow as pa
        import pyarrow.json

        if b"NaN" in lines or b"Infinity" in lines:
            lines = _NOT_FINITE.sub(b"null", lines)
        try:
            if _is_deep(lines):
                raise ValueError("Arrow would end the process")
            table = pyarrow.json.read_json(BytesIO(lines))
            names, columns = table.column_names, [column.combine_chunks() for column in table.columns]
        except (pa.ArrowInvalid, ValueError):  # ValueError: deep, or not UTF-8
            rows = [row for line in lines.split(b"\n") if line.strip() and (row := self._row(line)) is not None]
            names = list({key: None for row in rows for key in row})
            columns = [_array([row.get(key) for row in rows]) for key in names]
        arrays = dict(zip(names, columns, strict=True))
        if "step" not in arrays or not (
            pa.types.is_integer(arrays["step"].type) or pa.types.is_floating(arrays["step"].type)
        ):
            self.unreadable += len(lines.split(b"\n")) - 1
            return {}
        steps = arrays.pop("step").to_numpy(zero_copy_only=False)
        parsed = {key: _column(steps, array) for key, array in arrays.items() if array is not None}
        return {key: column for key, column in parsed.items() if column is not None}

    def _row(self, line: bytes) -> dict[str, Any] | None:
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] <= _MAX_STEP:
            return row
        self.unreadable += 1
        return None


def _array(values: list[Any]) -> Any:
    """Values as an Arrow array; None if they have no common type."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, RecursionError):
        return None


def _column(steps: npt.NDArray[Any], array: Any) -> MetricColumn | None:
    """The column of an Arrow array; None if its values are not numbers."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
        kept = np.isfinite(values) & _are_steps(steps)
        return _in_order(steps[kept].astype(np.int64), values[kept])
    if pa.types.is_list(kind):
        rows = np.flatnonzero(np.asarray(array.is_valid()) & _are_steps(steps))
        if len(rows) > _MAX_LAYER_ROWS:
            rows = rows[np.unique(np.linspace(0, len(rows) - 1, _MAX_LAYER_ROWS).astype(int))]
        try:
            values = np.array(array.take(pa.array(rows)).to_pylist(), np.float64)  # None becomes NaN
        except (ValueError, TypeError):  # ragged, or not numbers
            return None
        return _in_order(steps[rows].astype(np.int64), values) if values.size else None
    return None


def _is_deep(lines: bytes) -> bool:
    """Whether a line may be nested so deeply that Arrow, which reads it recursively, overflows its stack."""
    return any(
        len(line) > _MAX_OPENED and line.count(b"[") + line.count(b"{") > _MAX_OPENED for line in lines.split(b"\n")
    )


def _are_steps(steps: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        return np.asarray((steps >= 0) & (steps <= _MAX_STEP))  # NaN is not


def _in_order(steps: Ints, values: Floats) -> MetricColumn:
    """A column with increasing steps; if a step occurs twice, its later row is kept."""
    if len(steps) > 1 and not np.all(steps[1:] > steps[:-1]):
        steps, last = np.unique(steps[::-1], return_index=True)
        values = values[::-1][last]
    return MetricColumn(steps, values)


def _append(before: MetricColumn, after: MetricColumn) -> MetricColumn:
    """Both columns; only the later one if values per layer have changed their shape."""
    if before.values.shape[1:] != after.values.shape[1:]:
        return after
    steps, values = (np.concatenate(parts) for parts in zip(before, after, strict=True))
    return _in_order(steps, values)


def extremes(column: MetricColumn, buckets: int) -> MetricColumn:
    """Reduces a column to the minimum and maximum of each bucket and both ends, so that spikes remain visible.

    Args:
        column: scalar values, (N,).
        buckets: number of buckets, ≥ 1.

    Returns:
        At most 2 · buckets + 2 of the column's points.
    """
    count = len(column.steps)
    if count <= 2 * buckets + 2:
        return column
    inner = column.values[1:-1]
    size = -(-len(inner) // buckets)
    full = len(inner) // size
    rows = inner[: full * size].reshape(full, size)
    starts = np.arange(full) * size
    indices = [starts + rows.argmin(1), starts + rows.argmax(1)]
    rest = inner[full * size :]
    if len(rest):
        indices.append(full * size + np.array([rest.argmin(), rest.argmax()]))
    kept = np.unique(np.concatenate([[0], *(index + 1 for index in indices), [count - 1]]))
    return MetricColumn(column.steps[kept], column.values[kept])


def trend(column: MetricColumn, points: int = 300) -> MetricColumn | None:
    """A centred running mean over about a hundredth of the column.

    Args:
        column: scalar values, (N,).
        points: maximum number of points of the result.

    Returns:
        The means; None if the column has fewer than 300 values.
    """
    count = len(column.steps)
    window = count // 100
    if window < 3:
        return None
    sums = np.concatenate([[0.0], np.cumsum(column.values)])
    middles = np.unique(np.linspace(0, count - 1, points).astype(int))
    to_end = np.minimum(middles, count - 1 - middles)
    half = np.minimum(
        window // 2, np.maximum(to_end, window // 8)
    )  # narrower near the ends, and almost symmetric there
    low, high = np.maximum(0, middles - half), np.minimum(count, middles + half + 1)
    return MetricColumn(column.steps[middles], (sums[high] - sums[low]) / (high - low))
