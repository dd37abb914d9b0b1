"""Small files that are complete on the disk or not there at all, whatever ends the process or the machine."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Writes a text under a temporary name beside `path`, syncs it, and renames it into place.

    Raises:
        OSError: the disk refused; what was at `path` before is unchanged.
    """
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


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
