"""Paths as users type them."""

from __future__ import annotations

import os
from pathlib import Path

from rwkv_train.errors import UserError

_NAME_BYTES, _PATH_BYTES = 255, 4095  # limits of Linux and its file systems


def user_path(text: str | Path) -> Path:
    """The path that a user has typed: ~ and ~NAME stand for home directories as in a shell, which leaves others alone.

    Raises:
        UserError: a name in it, or all of it, is longer than a file system takes.
    """
    path = Path(os.path.expanduser(text))
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > _NAME_BYTES or len(os.fsencode(path)) > _PATH_BYTES:
        what = f"a name of {longest} bytes" if longest > _NAME_BYTES else f"{len(os.fsencode(path))} bytes"
        raise UserError(
            f"{str(path)[:60]}… has {what}, more than a file system takes",
            f"valid: up to {_NAME_BYTES} bytes a name, {_PATH_BYTES} in all",
        )
    return path


def utf8_path(text: str | Path) -> Path:
    """`user_path` of a file that libraries open by a name in UTF-8, or that is named in JSON.

    Raises:
        UserError: it is too long, or not UTF-8.
    """
    path = user_path(text)
    if is_utf8(str(path)):
        return path
    raise UserError(f"the name of {path} is not UTF-8", "rename it, or give it another name")


def is_utf8(text: str) -> bool:
    """Whether a text of the command line or of a file system is UTF-8; Python marks other bytes by lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
