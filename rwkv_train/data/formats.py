"""Which kind a data file is, by its name: text, JSON Lines, JSON, CSV or parquet, and how it is compressed."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet"]

KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".zst")


class FileFormat(NamedTuple):
    """The format of a file.

    Attributes:
        kind: by the last suffix before that of the compression, in capitals or not; None if it is not a known one.
        compression: gz, zst or empty.
    """

    kind: Kind | None
    compression: str


def format_of(path: Path) -> FileFormat:
    """The format of a file, by its suffixes."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop()[1:] if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return FileFormat(KINDS.get(suffixes[-1]) if suffixes else None, compression)


def open_decompressed(path: Path, compression: str) -> Any:
    """Opens a file for reading the bytes that it has when it is not compressed.

    Args:
        path: the file.
        compression: gz, zst or empty.

    Raises:
        OSError: it cannot be opened.
    """
    if compression == "gz":
        return gzip.open(path, "rb")
    file = open(path, "rb")  # noqa: SIM115  closed by the reader, or by the caller
    if not compression:
        return file
    import zstandard

    return io.BufferedReader(zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(file, closefd=True))
