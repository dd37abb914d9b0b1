"""What there is to read, cut into units that a process can read on its own.

A unit is about 32 MiB of text, and gives documents: bytes, or the reason why one is left out. The order of the units,
and what each holds, is a function of the files alone.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from rwkv_train.data.corpus import find_files
from rwkv_train.errors import UserError

UNIT = 2**25  # bytes of text
FILES = 2000  # small files in one unit, at most
LONGEST = 2**24  # bytes of a document: longer texts are cut there at a line's end, longer lines of JSON are left out

EMPTY, NO_UTF8, NO_JSON, NO_TEXT, TOO_LONG, BINARY = (
    "empty",
    "no UTF-8",
    "no JSON",
    "without the text field",
    "a line of more than 16 MiB",
    "binary",
)


@dataclass(frozen=True)
class Skipped:
    """A document that is left out."""

    why: str
    where: str


Found = Iterator[bytes | Skipped]


class Unit(Protocol):
    @property
    def size(self) -> int:
        """Bytes that are read for it, about."""

    def documents(self) -> Found:
        """What it holds, in order."""


@dataclass(frozen=True)
class Lines:
    """The lines of JSON that begin in a range of a file."""

    path: str
    begin: int
    end: int
    field: str

    @property
    def size(self) -> int:
        return self.end - self.begin

    def documents(self) -> Found:
        with open(self.path, "rb", buffering=2**20) as file:
            if self.begin:
                file.seek(self.begin - 1)
                _skip_line(file)
            while (at := file.tell()) < self.end:
                line = file.readline(LONGEST + 1)
                if len(line) > LONGEST and not line.endswith(b"\n"):
                    _skip_line(file)
                    yield Skipped(TOO_LONG, f"{self.path}, byte {at}")
                elif line.strip():
                    yield from _parsed(line, self.field, f"{self.path}, byte {at}")


@dataclass(frozen=True)
class LineBlock:
    """Lines of JSON that were unpacked already."""

    name: str
    first: int  # number of its first line
    lines: bytes
    field: str

    @property
    def size(self) -> int:
        return len(self.lines)

    def documents(self) -> Found:
        for number, line in enumerate(io.BytesIO(self.lines), self.first):
            if len(line) > LONGEST:
                yield Skipped(TOO_LONG, f"{self.name}, line {number}")
            elif line.strip():
                yield from _parsed(line, self.field, f"{self.name}, line {number}")


@dataclass(frozen=True)
class TextRange:
    """The whole lines of a long text that begin in a range of a file: a document."""

    path: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def documents(self) -> Found:
        with open(self.path, "rb") as file:
            begin = _next_line(file, self.begin)
            end = _next_line(file, self.end)
            file.seek(begin)
            text = file.read(end - begin)
        if text:  # else one line reaches through the whole range
            yield from _text(text, f"{self.path}, byte {begin}")


@dataclass(frozen=True)
class Texts:
    """Files that are a document each, or texts that were read already."""

    paths: tuple[str, ...]
    size: int
    texts: tuple[bytes, ...] = ()

    def documents(self) -> Found:
        for path, text in zip(self.paths, self.texts, strict=False):
            yield from _text(text, path)
        for path in self.paths[len(self.texts) :]:
            yield from _text(Path(path).read_bytes(), path)


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file."""

    path: str
    number: int
    size: int
    field: str

    def documents(self) -> Found:
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(self.path) as file:
            if self.field not in file.schema_arrow.names:
                raise UserError(
                    f"{self.path} has no column {self.field}; there is {', '.join(file.schema_arrow.names)}",
                    "--field COLUMN",
                )
            for batch in file.iter_batches(1024, row_groups=[self.number], columns=[self.field]):
                for row, text in enumerate(batch.column(0).to_pylist()):
                    where = f"{self.path}, row group {self.number}, row {row}"
                    yield from _text(text.encode(), where) if isinstance(text, str) else [Skipped(NO_TEXT, where)]


def _parsed(line: bytes, field: str, where: str) -> Found:
    try:
        text = json.loads(line)[field]
    except UnicodeDecodeError:
        yield Skipped(NO_UTF8, where)
    except ValueError:
        yield Skipped(NO_JSON, where)
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
            except UnicodeEncodeError:  # half of a surrogate pair, written as an escape
                yield Skipped(NO_UTF8, where)


def _text(text: bytes, where: str) -> Found:
    if not text:
        yield Skipped(EMPTY, where)
    elif b"\0" in text[:8192]:
        yield Skipped(BINARY, where)
    else:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            yield Skipped(NO_UTF8, f"{where}, at {error.start}")
        else:
            yield text


def _skip_line(file: IO[bytes]) -> None:
    while (piece := file.readline(2**20)) and not piece.endswith(b"\n"):
        pass


def _next_line(file: IO[bytes], at: int) -> int:
    """Where the first line from a place on begins."""
    if at == 0:
        return 0
    file.seek(at - 1)
    _skip_line(file)
    return file.tell()


def find_sources(sources: Sequence[str]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Files with their names, and names of data sets, that the command line's words mean.

    Raises:
        UserError: a word is neither a file, a directory, a glob of files, nor may be a data set's name.
    """
    files: list[tuple[str, Path]] = []
    names: list[str] = []
    for word in sources:
        path = Path(word).expanduser()
        matches = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        for match in matches:
            files += [
                (str(match / name) if match.is_dir() else str(match), file) for name, file in find_files(match)[0]
            ]
        if not matches:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", word) or path.suffix:
                raise UserError(f"{word}: there is no such file or directory", f"it is taken from {os.getcwd()}")
            names.append(word)
        elif not any(match.is_file() or any(match.iterdir()) for match in matches):
            raise UserError(f"{word} is an empty directory", "name a directory with text, .jsonl or .parquet files")
    return files, names


def units(files: Sequence[tuple[str, Path]], names: Sequence[str], field: str, split: str) -> Iterator[Unit]:
    """All units of what find_sources found."""
    small: list[tuple[str, int]] = []
    for _, path in files:
        kind, packing = _kind(path)
        size = path.stat().st_size
        if kind == "text" and not packing and size <= LONGEST:
            small.append((str(path), size))
            if len(small) == FILES or sum(size for _, size in small) >= UNIT:
                yield _together(small)
                small = []
            continue
        if small:
            yield _together(small)
            small = []
        if kind == "parquet":
            yield from _row_groups(path, field)
        elif packing:
            yield from _unpacked(path, kind, packing, field)
        else:
            step = UNIT if kind == "jsonl" else LONGEST
            for begin in range(0, size, step):
                end = min(begin + step, size)
                yield Lines(str(path), begin, end, field) if kind == "jsonl" else TextRange(str(path), begin, end)
    if small:
        yield _together(small)
    for name in names:
        yield from _streamed(name, field, split)


def _kind(path: Path) -> tuple[str, str]:
    """What a file holds (jsonl, parquet or text), and how it is packed (gz, zst or not)."""
    suffixes = path.suffixes
    packing = suffixes.pop()[1:] if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    kind = suffixes[-1] if suffixes else ""
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(kind, "text"), packing


def _together(small: Sequence[tuple[str, int]]) -> Texts:
    return Texts(tuple(path for path, _ in small), sum(size for _, size in small))


def _row_groups(path: Path, field: str) -> Iterator[Unit]:
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            groups = file.metadata.num_row_groups
    except Exception as error:  # pyarrow raises its own and the system's
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no parquet file: {reason}", "copy it anew, or leave it out") from None
    for number in range(groups):
        yield RowGroup(str(path), number, path.stat().st_size // groups, field)


def _unpacked(path: Path, kind: str, packing: str, field: str) -> Iterator[Unit]:
    """A packed file is unpacked by the parent, since nobody can begin in its middle; the rest is done by the others."""
    number, rest, cut = 1, b"", False  # cut: the last block ended within a line, which was given up
    try:
        with _open_packed(path, packing) as file:
            while block := file.read(UNIT if kind == "jsonl" else LONGEST):
                if cut:
                    block = block[block.find(b"\n") + 1 :] if b"\n" in block else b""
                    cut = not block
                block = rest + block
                end = block.rfind(b"\n") + 1
                if not end and len(block) <= 2 * UNIT:
                    rest = block
                    continue
                whole, rest, cut = (block[:end], block[end:], False) if end else (block, b"", kind == "jsonl")
                yield _block(path, kind, number, whole, field)
                number += max(1, whole.count(b"\n"))
    except Exception as error:  # the system's, gzip's, zlib's, zstandard's
        raise UserError(f"{path} cannot be unpacked: {error}", "copy it anew, or leave it out") from None
    if rest:
        yield _block(path, kind, number, rest, field)


def _open_packed(path: Path, packing: str) -> Any:
    if packing == "gz":
        return gzip.open(path, "rb")
    import zstandard

    file = open(path, "rb")  # noqa: SIM115  the reader closes it
    return io.BufferedReader(zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(file, closefd=True))


def _block(path: Path, kind: str, number: int, whole: bytes, field: str) -> Unit:
    if kind == "jsonl":
        return LineBlock(str(path), number, whole, field)
    return Texts((f"{path}, line {number}",), len(whole), (whole,))


def _streamed(name: str, field: str, split: str) -> Iterator[Unit]:
    from rwkv_train.data.stream import open_dataset, texts_of

    texts: list[bytes] = []
    size = 0
    rows: Any = enumerate(texts_of(open_dataset(name, split), field))
    for row, text in rows:
        texts.append(text)
        size += len(text)
        if size >= UNIT:
            yield Texts(tuple(f"{name}, row {row - len(texts) + 1 + n}" for n in range(len(texts))), size, tuple(texts))
            texts, size = [], 0
    if texts:
        yield Texts(tuple(f"{name}, one of the last {len(texts)} rows" for _ in texts), size, tuple(texts))
