"""Rows of metrics.jsonl files found by their byte offsets: no more is read and parsed than is asked for.

The rows of one file ascend by step. A run of weeks has gigabytes of them, and reads them at each of its starts.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_train.json_files import open_regular
from rwkv_train.rundir.record_lines import Record, metrics_row

_BLOCK = 2**16  # bytes that are read to look at their rows
_CHUNK = 2**22  # bytes that are copied at once
_BEGIN = b'{"step": '  # of each row that this package writes


def complete_size(file: BinaryIO) -> int:
    """Bytes of the complete lines of a file; a last one that a kill has cut off is not among them."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        if (found := file.read(end - begin).rfind(b"\n")) >= 0:
            return begin + found + 1
        end = begin
    return 0


def end_of_steps(file: BinaryIO, size: int, step: int) -> int:
    """The offset behind the last row of a step that is not later than `step`; 0: there is none.

    Args:
        file: the rows.
        size: bytes of its complete lines.
        step: the last one that is wanted.
    """
    low, high = 0, size  # the rows before `low` are not later; those from `high` on are later, or there are none
    while high - low > _BLOCK:
        middle = (low + high) // 2
        file.seek(middle)
        file.readline()
        end, record = _next(file, high)
        if record is None or record.row["step"] > step:
            high = middle
        else:
            low = end
    file.seek(low)
    while low < size:
        end, record = _next(file, size)
        if record is None or record.row["step"] > step:
            break
        low = end
    return low


def _next(file: BinaryIO, size: int) -> tuple[int, Record | None]:
    """The next row before an offset, and the offset behind it; None: there is none."""
    while (begin := file.tell()) < size:
        line = file.readline()
        if (row := metrics_row(line)) is not None:
            return begin + len(line), Record(line, row)
    return size, None


def rows_between(file: BinaryIO, begin: int, end: int) -> Iterator[Record]:
    """The rows between two offsets."""
    file.seek(begin)
    while (found := _next(file, end)[1]) is not None:
        yield found


def last_row_before(file: BinaryIO, end: int) -> Record | None:
    """The last row before an offset, which is the end of a line; None: there is none."""
    rest = b""  # the end of the block is a part of a line
    while end > 0:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        first, *lines = (file.read(end - begin) + rest).splitlines(keepends=True)
        if begin == 0:
            lines, first = [first, *lines], b""
        for line in reversed(lines):
            if (row := metrics_row(line)) is not None:
                return Record(line, row)
        end, rest = begin, first
    return None


def last_row_in(path: Path) -> dict[str, Any] | None:
    """The last row of a file; None: it has none, or cannot be read."""
    try:
        with open_regular(path) as file:
            record = last_row_before(file, complete_size(file))
    except (OSError, ValueError):
        return None
    return None if record is None else record.row


def copy_rows(file: BinaryIO, begin: int, end: int, target: BinaryIO) -> list[int]:
    """Copies the rows between two offsets, without the lines that are no rows where damage can be seen in the bytes.

    Lines are parsed only near damage: zeros, other binary, and lines that are cut, joined or not a flat object whose
    first key is the step.

    Args:
        file: the rows.
        begin, end: ends of lines.
        target: an unbuffered file; it is written at its position.

    Returns:
        the numbers of the lines that were left out, from 1.

    Raises:
        OSError: a file cannot be read, or the disk takes only a part.
    """
    file.seek(0)
    number = sum(file.read(min(_CHUNK, begin - at)).count(b"\n") for at in range(0, begin, _CHUNK))
    left_out: list[int] = []
    file.seek(begin)
    while (at := file.tell()) < end:
        chunk = file.read(min(_CHUNK, end - at))
        if at + len(chunk) < end:
            chunk += file.readline()
        if not _looks_whole(chunk):
            lines = chunk.splitlines(keepends=True)
            good = [metrics_row(line) is not None for line in lines]
            left_out += [number + place for place, row in enumerate(good, 1) if not row]
            chunk = b"".join(line for line, row in zip(lines, good, strict=True) if row)
            number += len(lines)
        else:
            number += chunk.count(b"\n")
        write_all(target, chunk)
    return left_out


def _looks_whole(chunk: bytes) -> bool:
    """Whether complete lines are rows, as far as counting bytes can say."""
    lines = chunk.count(b"\n")
    return (
        chunk.isascii()
        and b"\0" not in chunk
        and chunk.count(b"{") == chunk.count(b"}") == lines
        and chunk.startswith(_BEGIN)
        and chunk.count(b"\n" + _BEGIN) == lines - 1
    )


def write_all(file: BinaryIO, data: bytes) -> None:
    """Writes to an unbuffered file.

    Raises:
        OSError: the disk refused, or took only a part.
    """
    if file.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
