"""Locks of files between processes, which the kernel releases when a process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import sys
from typing import IO, Any

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of some network file systems


def lock(file: IO[Any], wait: bool = False) -> bool:
    """Locks an open file for this process until it is closed.

    On a file system without locks a warning is printed, and nothing keeps a second process out.

    Args:
        file: opened for writing.
        wait: whether to wait for the process that holds the lock.

    Returns:
        whether this process may go on; False: another one holds the lock.

    Raises:
        OSError: the file system refuses for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"WARNING: {file.name} cannot be locked ({error.strerror}): make sure that no second process uses it",
            file=sys.stderr,
        )
    return True
