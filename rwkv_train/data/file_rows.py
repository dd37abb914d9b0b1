"""The rows of local parquet, .json and text files, in which a damaged part costs that part only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv_train.data.formats import format_of, open_decompressed
from rwkv_train.data.json_lines import parsed_row
from rwkv_train.data.tables import array_elements, json_layout
from rwkv_train.json_files import MAX_BYTES, reason_of

_ROWS_AT_ONCE = 1024
_BYTES_PER_ROW = 4096  # of a damaged file, where no row has been read yet

Row = dict[str, Any] | str  # its object, or what is wrong with it


class FileRows:
    """The rows of files, in the order of the files, with the interface of an IterableDataset that the stream uses.

    A file or the part of it that cannot be read counts as many rows as the files before had in so many bytes.

    Args:
        files: paths of .parquet, .json or text files; a text file is one row.
        field: the column of the text.

    Attributes:
        where: file and row of the row that was read last.
    """

    def __init__(self, files: Sequence[str], field: str) -> None:
        self.files, self.field, self.where = tuple(files), field, ""
        self._file, self._row = 0, 0
        self._rows_read, self._bytes_read = 0, 0  # of complete files

    def state_dict(self) -> dict[str, Any]:
        """The position behind the row that was read last."""
        return {"file": self._file, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets the next iteration begin at a position."""
        self._file, self._row = state["file"], state["row"]

    def __iter__(self) -> Iterator[Row]:
        """Yields each row."""
        while self._file < len(self.files):
            path = Path(self.files[self._file])
            try:
                for row in self._rows(path, self._row):
                    self._row += 1
                    self.where = f"{path}, row {self._row}"
                    yield row
                self._rows_read, self._bytes_read = self._rows_read + self._row, self._bytes_read + path.stat().st_size
            except Exception as error:  # pyarrow's own types, OSError, UserError
                self.where = f"{path}, from row {self._row + 1} on"
                reason = f"cannot be read ({reason_of(error)})"
                for _ in range(max(1, self._rows_in(path) - self._row)):
                    yield reason
            self._file, self._row = self._file + 1, 0

    def _rows(self, path: Path, first: int) -> Iterator[Row]:
        kind, compression = format_of(path)
        if kind == "parquet":
            return parquet_rows(path, self.field, first)
        if kind == "text":
            return _text(path, compression, self.field, first)
        return _json(path, compression, self.field, first)

    def _rows_in(self, path: Path) -> int:
        """About how many rows a file has."""
        size = path.stat().st_size if path.exists() else 0
        return size * self._rows_read // self._bytes_read if self._bytes_read else size // _BYTES_PER_ROW


def parquet_rows(path: Path, field: str, first: int = 0) -> Iterator[Row]:
    """Yields the column of each row of a parquet file, or why it cannot be read; a damaged row group costs its rows.

    Args:
        path: the file.
        field: the column; if there is none of that name, the rows have all columns, without values.
        first: the number of the row to begin with.

    Raises:
        OSError: the file cannot be opened, or is none (pyarrow's ArrowInvalid is one).
    """
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if first < count:
                yield from group_rows(file, group, field, first)
            first = max(0, first - count)


def group_rows(file: Any, group: int, field: str, first: int = 0) -> Iterator[Row]:
    """Yields the rows of a row group of an open parquet file, from a row on."""
    count, row, columns = file.metadata.row_group(group).num_rows, 0, file.schema_arrow.names
    if field not in columns:
        yield from (dict.fromkeys(columns) for _ in range(count - first))
        return
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[field]):
            column = batch.column(0)
            for number in range(max(0, first - row), len(column)):
                yield _value(column, number, field)
            row += len(column)
    except Exception as error:  # pyarrow's own types, and OSError
        reason = f"its row group {group} cannot be read ({reason_of(error)})"
        yield from (reason for _ in range(count - max(row, first)))


def _value(column: Any, number: int, field: str) -> Row:
    try:
        value = column[number].as_py()
        return {field: value.decode() if isinstance(value, bytes) else value}
    except UnicodeDecodeError:
        return "not UTF-8"


def _text(path: Path, compression: str, field: str, first: int) -> Iterator[Row]:
    """The one row of a text file, none if it is empty."""
    with open_decompressed(path, compression) as file:
        content = b"" if first else file.read()
    if content:
        try:
            yield {field: content.decode()}
        except UnicodeDecodeError:
            yield "not UTF-8"


def _json(path: Path, compression: str, field: str, first: int) -> Iterator[Row]:
    """The objects of a .json file: one in each line, those of an array, or a single one."""
    layout = json_layout(path, compression, field)
    if layout == "value":
        with open_decompressed(path, compression) as file:
            content = file.read(MAX_BYTES + 1)
        if not first:
            yield parsed_row(content) if len(content) <= MAX_BYTES else f"an object of more than {MAX_BYTES:,} bytes"
        return
    number = 0
    if layout == "array":
        for line in array_elements(path, compression):
            number += 1
            if number > first:
                yield parsed_row(line)
        return
    with open_decompressed(path, compression) as file:
        for line in iter(file.readline, b""):
            if line.strip():
                number += 1
                if number > first:
                    yield parsed_row(line)
