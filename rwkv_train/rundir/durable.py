"""Small files that are complete on the disk or not there at all, whatever ends the process or the machine."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_durably(path: Path, text: str, sync: bool = True) -> None:
    """Writes a text under a temporary name beside `path`, syncs it, and renames it into place.

    Args:
        path: the file.
        text: its content.
        sync: whether to wait for the disk. Without it a power failure, but no kill, may leave an empty file.

    Raises:
        OSError: the disk refused; what was at `path` before is unchanged.
    """
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    with open(temporary, "x", encoding="utf-8") as file:  # x: never through a link that lies there
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if sync:
        sync_directory(path.parent)


def write_state(path: Path, state: Mapping[str, Any], sync: bool = True) -> None:
    """Writes values as JSON, as `write_durably` does; makes the directory if it is missing.

    Raises:
        OSError: the disk refused; what was at `path` before is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(state), sync)


def sync_directory(path: Path) -> None:
    """Puts the names in a directory on the disk, where the file system can do that for a directory.

    Raises:
        OSError: the disk refused.
    """
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(directory)
