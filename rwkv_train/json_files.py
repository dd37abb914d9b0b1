"""JSON that a full disk, a killed node or a stranger may have written: what cannot be read is one kind of error.

The package reads JSON through this module only; `tests/test_structure.py` checks it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_train.errors import UserError

MAX_BYTES = 64 * 2**20  # of a file that is read as a whole; metadata of the largest checkpoints are some MB
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_REASON = 200  # characters of a reason in a message


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text. Halves of surrogate pairs, which no file or terminal takes, become U+FFFD.

    Raises:
        ValueError: it is none: not UTF-8, cut off, nested too deeply, a number too long.
    """
    decoded = text if isinstance(text, str) else text.decode("utf-8")
    try:
        found = json.loads(decoded)
        return presentable(found, finite=False) if _ESCAPED_SURROGATE.search(decoded) else found
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a device or a pipe.
    """
    # without blocking: opening a pipe would wait for its writer
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("it is not a regular file")
    return file


def read_regular(path: Path, limit: int | None = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a device or a pipe, or has more than `limit` bytes; None: any number.
    """
    with open_regular(path) as file:
        if limit is not None and os.fstat(file.fileno()).st_size > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
        return file.read()


def load_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no JSON object, is a device or a pipe, or has more than `limit` bytes.
    """
    found = parse_json(read_regular(path, limit))
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def read_object(path: Path, remedy: str, limit: int = MAX_BYTES) -> dict[str, Any]:
    """`load_object`, with an error for the user.

    Args:
        path: the file.
        remedy: of the error.
        limit: bytes that the file may have.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds no JSON object, or cannot be read.
    """
    try:
        return load_object(path, limit)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}", remedy) from None


def reason_of(error: BaseException) -> str:
    """Why a file cannot be read, in a part of a line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())[:_MAX_REASON]


def presentable(value: Any, finite: bool = True) -> Any:
    """JSON values that every program can read: halves of surrogate pairs become U+FFFD.

    Args:
        value: lists, dicts and plain values.
        finite: whether numbers that are not finite become None.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list | tuple):
        return [presentable(one, finite) for one in value]
    if isinstance(value, dict):
        return {presentable(key, finite): presentable(one, finite) for key, one in value.items()}
    return None if finite and isinstance(value, float) and not math.isfinite(value) else value
