"""Rows of JSON and CSV files that cannot be read from the middle, as lines of JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rwkv_train.data.formats import open_decompressed
from rwkv_train.errors import UserError

_READ_CHARACTERS = 2**20  # of an array, at first; doubled while an element is longer
_MAX_ELEMENT_CHARACTERS = 2**26
_HEAD_BYTES = 2**24  # of a line of a .json file, to see whether it is a complete object
_BLANKS = " \t\r\n"


def json_layout(path: Path, compression: str, field: str) -> Literal["lines", "array", "value"]:
    """How a .json file is written: an object in each line, an array of objects, or any other single value.

    A single object in a single line is a value, unless it has a text in the field.

    Args:
        path: the file.
        compression: gz, zst or empty.
        field: key of the text.

    Raises:
        UserError: it cannot be decompressed.
    """
    try:
        with open_decompressed(path, compression) as file:
            head = list(islice((line for line in iter(lambda: file.readline(_HEAD_BYTES), b"") if line.strip()), 5))
    except Exception as error:  # OSError, and the types of gzip, zlib and zstandard
        raise UserError(f"{path} cannot be read: {error}", "copy it again, or leave it out") from None
    objects = [_object(line) for line in head]
    if objects and objects[0] is not None and (len(head) > 1 or isinstance(objects[0].get(field), str)):
        return "lines"
    if len([value for value in objects if value is not None]) > 1:
        return "lines"  # the first of them is damaged
    begin = b"".join(head).decode("utf-8-sig", "replace").lstrip()
    return "array" if begin.startswith("[") and begin[1:].lstrip().startswith("{") else "value"


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def csv_rows(path: Path, compression: str, delimiter: str, field: str) -> Iterator[bytes]:
    """Yields the text of each row of a CSV file as a line of JSON; of a file without that column a single `{}`.

    Bytes that are not UTF-8 become lone surrogates.

    Raises:
        UserError: a row has more than 64 Mi characters.
    """
    csv.field_size_limit(_MAX_ELEMENT_CHARACTERS)
    with io.TextIOWrapper(open_decompressed(path, compression), "utf-8-sig", "surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        if field not in (rows.fieldnames or ()):
            yield b"{}\n"
            return
        try:
            for row in rows:
                yield json.dumps({field: row[field]}).encode() + b"\n"
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: {error}", "copy the file again, or leave it out") from None


def array_elements(path: Path, compression: str) -> Iterator[bytes]:
    """Yields each element of a JSON array as a line of JSON; memory holds a few of them.

    Bytes that are not UTF-8 become lone surrogates.

    Raises:
        UserError: the file is not one complete array, or an element is too long.
    """
    decoder, number = json.JSONDecoder(), 0
    with io.TextIOWrapper(open_decompressed(path, compression), "utf-8-sig", "surrogateescape") as file:
        rest = file.read(_READ_CHARACTERS).lstrip(_BLANKS)[1:]  # without the bracket
        while not (rest := rest.lstrip(_BLANKS)).startswith("]"):
            rest = rest.removeprefix(",").lstrip(_BLANKS) if number else rest
            try:
                element, end = decoder.raw_decode(rest)
                if end == len(rest):
                    raise ValueError("a number may go on")
            except (ValueError, RecursionError) as error:
                more = file.read(max(_READ_CHARACTERS, len(rest)))
                if not more or len(rest) > _MAX_ELEMENT_CHARACTERS:
                    raise UserError(
                        f"{path}, element {number + 1}: not complete JSON, or too long ({error})",
                        "copy the file again, or write one object per line (.jsonl)",
                    ) from None
                rest += more
                continue
            yield json.dumps(element).encode() + b"\n"
            rest, number = rest[end:], number + 1
