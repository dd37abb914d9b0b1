"""The input of `prepare`, divided into units of work that a process can read on its own.

A unit has about 32 MiB of text and yields documents: their bytes, or the reason why one is left out. The order of the
units and their content depend on the files alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

from rwkv_train.data.bad_rows import BadRows
from rwkv_train.data.file_rows import group_rows
from rwkv_train.data.formats import format_of, open_decompressed
from rwkv_train.data.prepare.skipped import BINARY, EMPTY, NO_TEXT, NOT_JSON, NOT_UTF8, TOO_LONG, UNREADABLE, Skipped
from rwkv_train.data.tables import array_elements, csv_rows, json_layout
from rwkv_train.errors import UserError

UNIT_BYTES = 2**25  # of text
MAX_FILES_PER_UNIT = 2000
MAX_DOCUMENT_BYTES = 2**24  # longer texts are cut at the end of a line, longer lines of JSON are left out

Documents = Iterator[bytes | Skipped]


class Unit(Protocol):
    """A part of the input that one process reads."""

    @property
    def size(self) -> int:
        """Approximate number of bytes read, for the progress bar."""

    def documents(self) -> Documents:
        """Yields the documents in order."""


@dataclass(frozen=True)
class JsonLinesRange:
    """The lines of a JSON Lines file that begin in the byte range begin … end - 1."""

    path: str
    begin: int
    end: int
    field: str

    @property
    def size(self) -> int:
        return self.end - self.begin

    def documents(self) -> Documents:
        with open(self.path, "rb", buffering=2**20) as file:
            if self.begin:
                file.seek(self.begin - 1)
                _skip_line(file)
            while (offset := file.tell()) < self.end:
                line = file.readline(MAX_DOCUMENT_BYTES + 1)
                if len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                    _skip_line(file)
                    yield Skipped(TOO_LONG, f"{self.path}, byte {offset}", offset, self.path)
                elif line.strip():
                    for found in _parsed(line, self.field, f"{self.path}, byte {offset}"):
                        yield replace(found, byte=offset, path=self.path) if isinstance(found, Skipped) else found


@dataclass(frozen=True)
class JsonLinesBlock:
    """Lines of JSON from a compressed file, decompressed by the parent process.

    Attributes:
        name: path of the file, for messages.
        first: line number of the first line in the file, from 1.
        lines: complete lines.
        field: key of the text.
        noun: what the file calls such a line.
    """

    name: str
    first: int
    lines: bytes
    field: str
    noun: str = "line"

    @property
    def size(self) -> int:
        return len(self.lines)

    def documents(self) -> Documents:
        for number, line in enumerate(io.BytesIO(self.lines), self.first):
            if len(line) > MAX_DOCUMENT_BYTES:
                yield Skipped(TOO_LONG, f"{self.name}, {self.noun} {number}")
            elif line.strip():
                yield from _parsed(line, self.field, f"{self.name}, {self.noun} {number}")


@dataclass(frozen=True)
class TextRange:
    """The lines of a long text file that begin in the byte range begin … end - 1, as one document."""

    path: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def documents(self) -> Documents:
        with open(self.path, "rb") as file:
            begin = _next_line(file, self.begin)
            end = _next_line(file, self.end)
            file.seek(begin)
            text = file.read(end - begin)
        if text:  # empty if a single line spans the range
            yield from _text(text, f"{self.path}, byte {begin}")


@dataclass(frozen=True)
class TextFiles:
    """Text files, each of them a document.

    Attributes:
        paths: the files; for `texts`, where each text comes from.
        size: total number of bytes.
        texts: texts that the parent process has already read, for the first paths.
    """

    paths: tuple[str, ...]
    size: int
    texts: tuple[bytes, ...] = ()

    def documents(self) -> Documents:
        for path, text in zip(self.paths, self.texts, strict=False):
            yield from _text(text, path)
        for path in self.paths[len(self.texts) :]:
            yield from _text(Path(path).read_bytes(), path)


@dataclass(frozen=True)
class ParquetRowGroup:
    """A row group of a parquet file, each row a document.

    Attributes:
        path: the parquet file.
        number: number of the row group.
        size: approximate size in bytes.
        field: column of the text.
    """

    path: str
    number: int
    size: int
    field: str

    def documents(self) -> Documents:
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
            if self.field not in file.schema_arrow.names:
                raise UserError(
                    f"{self.path} has no column {self.field}; its columns are {', '.join(file.schema_arrow.names)}",
                    "give the column of the text: --field COLUMN",
                )
            for number, row in enumerate(group_rows(file, self.number, self.field)):
                where = f"{self.path}, row group {self.number}, row {number}"
                if isinstance(row, str):
                    yield Skipped(NOT_UTF8 if row == NOT_UTF8 else UNREADABLE, where)
                else:
                    text = row[self.field]
                    yield from _text(text.encode(), where) if isinstance(text, str) else [Skipped(NO_TEXT, where)]


@dataclass(frozen=True)
class RowsLeftOut:
    """The rows of a data set that the parent process has left out.

    Attributes:
        name: of the data set.
        count: how many.
        first: which are the first, and why.
    """

    name: str
    count: int
    first: tuple[str, ...]
    size: int = 0

    def documents(self) -> Documents:
        for number in range(self.count):
            yield Skipped(NO_TEXT, self.first[number] if number < len(self.first) else self.name)


def _parsed(line: bytes, field: str, where: str) -> Documents:
    try:
        text = json.loads(line)[field]
    except UnicodeDecodeError:
        yield Skipped(NOT_UTF8, where)
    except (ValueError, RecursionError):
        yield Skipped(NOT_JSON, where)
    except (KeyError, TypeError, IndexError):
        yield Skipped(NO_TEXT, where)
    else:
        if not isinstance(text, str):
            yield Skipped(NO_TEXT, where)
        elif not text:
            yield Skipped(EMPTY, where)
        else:
            try:
                yield text.encode()
            except UnicodeEncodeError:  # an escaped lone surrogate
                yield Skipped(NOT_UTF8, where)


def _text(text: bytes, where: str) -> Documents:
    if not text:
        yield Skipped(EMPTY, where)
    elif b"\0" in text[:8192]:
        yield Skipped(BINARY, where)
    else:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            yield Skipped(NOT_UTF8, f"{where}, at {error.start}")
        else:
            yield text


def _skip_line(file: IO[bytes]) -> None:
    while (piece := file.readline(2**20)) and not piece.endswith(b"\n"):
        pass


def _next_line(file: IO[bytes], offset: int) -> int:
    """The offset of the first line that begins at `offset` or later."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    _skip_line(file)
    return file.tell()


def units(files: Sequence[tuple[str, Path]], names: Sequence[str], field: str, split: str) -> Iterator[Unit]:
    """Yields all units of the input.

    Args:
        files: (name, path) of each file, of `find_sources`.
        names: names of data sets, of `find_sources`.
        field: column or JSON key of the text.
        split: split of the data sets.

    Raises:
        UserError: a file is damaged, or a data set cannot be opened.
    """
    small: list[tuple[str, int]] = []
    for _, path in files:
        kind, compression = format_of(path)
        size = path.stat().st_size
        layout = json_layout(path, compression, field) if kind == "json" else ""
        kind = "jsonl" if layout == "lines" else kind
        rows = layout == "array" or kind in ("jsonl", "csv", "tsv", "parquet")
        if not rows and not compression and size <= MAX_DOCUMENT_BYTES:
            small.append((str(path), size))
            if len(small) == MAX_FILES_PER_UNIT or sum(size for _, size in small) >= UNIT_BYTES:
                yield _text_files(small)
                small = []
            continue
        if small:
            yield _text_files(small)
            small = []
        if kind == "parquet":
            yield from _row_groups(path, field)
        elif layout == "array":
            yield from _blocks(path, array_elements(path, compression), field, "element")
        elif kind in ("csv", "tsv"):
            yield from _blocks(path, csv_rows(path, compression, "\t" if kind == "tsv" else ",", field), field, "row")
        elif compression:
            yield from _decompressed(path, "jsonl" if rows else "text", compression, field)
        else:
            step = UNIT_BYTES if rows else MAX_DOCUMENT_BYTES
            for begin in range(0, size, step):
                end = min(begin + step, size)
                yield JsonLinesRange(str(path), begin, end, field) if rows else TextRange(str(path), begin, end)
    if small:
        yield _text_files(small)
    for name in names:
        yield from _streamed_units(name, field, split)


def _blocks(path: Path, lines: Iterator[bytes], field: str, noun: str) -> Iterator[Unit]:
    """Blocks of lines of JSON, made by the parent process from a file that cannot be read from the middle."""
    number, block, size = 1, [], 0
    try:
        for line in lines:
            block.append(line)
            size += len(line)
            if size >= UNIT_BYTES:
                yield JsonLinesBlock(str(path), number, b"".join(block), field, noun)
                number, block, size = number + len(block), [], 0
    except UserError:
        raise
    except Exception as error:  # OSError, and the types of gzip, zlib and zstandard
        raise UserError(f"{path} cannot be read: {error}", "copy it again, or leave it out") from None
    if block:
        yield JsonLinesBlock(str(path), number, b"".join(block), field, noun)


def _text_files(small: Sequence[tuple[str, int]]) -> TextFiles:
    return TextFiles(tuple(path for path, _ in small), sum(size for _, size in small))


def _row_groups(path: Path, field: str) -> Iterator[Unit]:
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            groups = file.metadata.num_row_groups
    except Exception as error:  # pyarrow's own types, and OSError
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a parquet file: {reason}", "copy it again, or leave it out") from None
    for number in range(groups):
        yield ParquetRowGroup(str(path), number, path.stat().st_size // groups, field)


def _decompressed(path: Path, kind: str, compression: str, field: str) -> Iterator[Unit]:
    """Decompresses a file in the parent process, as it cannot be read from the middle; workers do the rest."""
    number, rest, cut = 1, b"", False  # cut: the previous block ended within a line that is too long and was emitted
    try:
        with open_decompressed(path, compression) as file:
            while block := file.read(UNIT_BYTES if kind == "jsonl" else MAX_DOCUMENT_BYTES):
                if cut:
                    cut = b"\n" not in block
                    block = b"" if cut else block[block.find(b"\n") + 1 :]
                block = rest + block
                end = block.rfind(b"\n") + 1
                if not end and len(block) <= 2 * UNIT_BYTES:
                    rest = block
                    continue
                lines, rest, cut = (block[:end], block[end:], False) if end else (block, b"", kind == "jsonl")
                yield _block_unit(path, kind, number, lines, field)
                number += max(1, lines.count(b"\n"))
    except Exception as error:  # OSError, and the types of gzip, zlib and zstandard
        raise UserError(f"{path} cannot be decompressed: {error}", "copy it again, or leave it out") from None
    if rest:
        yield _block_unit(path, kind, number, rest, field)


def _block_unit(path: Path, kind: str, number: int, lines: bytes, field: str) -> Unit:
    """The unit of complete decompressed lines, the first of which is line `number` of the file."""
    if kind == "jsonl":
        return JsonLinesBlock(str(path), number, lines, field)
    return TextFiles((f"{path}, line {number}",), len(lines), (lines,))


def _streamed_units(name: str, field: str, split: str) -> Iterator[Unit]:
    from rwkv_train.data.stream import open_dataset, texts_of

    texts: list[bytes] = []
    size = 0
    bad = BadRows(1)  # the share is checked where the counts of all units come together
    rows: Any = enumerate(texts_of(open_dataset(name, split, field), field, bad))
    for row, text in rows:
        texts.append(text)
        size += len(text)
        if size >= UNIT_BYTES:
            yield TextFiles(
                tuple(f"{name}, row {row - len(texts) + 1 + n}" for n in range(len(texts))), size, tuple(texts)
            )
            texts, size = [], 0
    if texts:
        yield TextFiles(tuple(f"{name}, one of the last {len(texts)} rows" for _ in texts), size, tuple(texts))
    if bad.bad:
        yield RowsLeftOut(name, bad.bad, tuple(bad.named))
