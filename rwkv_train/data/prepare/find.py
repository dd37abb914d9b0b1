"""What the sources on the command line of `prepare` are: files, or names of data sets."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rwkv_train.data.corpus import find_files, without_stores
from rwkv_train.errors import UserError
from rwkv_train.user_path import user_path


def find_sources(sources: Sequence[str]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Resolves the sources of the command line.

    Args:
        sources: files, directories, globs, or names of data sets.

    Returns:
        (name, path) of each file, and the names of data sets.

    Raises:
        UserError: a source is neither an existing file, directory or glob, nor a possible name of a data set.
    """
    files: list[tuple[str, Path]] = []
    names: list[str] = []
    for source in sources:
        path = Path("/dev/stdin") if source == "-" else user_path(source)
        matches = [path]
        if not path.exists():
            matches = without_stores([Path(name) for name in sorted(glob.glob(str(path), recursive=True))])
        for match in matches:
            files += [
                (str(match / name) if match.is_dir() else str(match), file) for name, file in find_files(match)[0]
            ]
        if not matches:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or path.suffix:
                raise UserError(
                    f"{source}: there is no such file or directory",
                    f"check the path; relative paths are resolved against {os.getcwd()}",
                )
            names.append(source)
        elif all(match.is_dir() and not any(match.iterdir()) for match in matches):
            raise UserError(f"{source} is an empty directory", "give a directory with text, .jsonl or .parquet files")
    return files, names
