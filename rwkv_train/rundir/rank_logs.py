"""What each rank prints, in a file of its own; the console is the first rank's."""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rwkv_train.cluster.rank_info import RankInfo

_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\r")  # colours, and movements of the cursor


def keep_log(directory: Path, rank_info: RankInfo) -> None:
    """From now on what this rank prints goes to `directory/rank_0003_NODE.log`, the first rank's to its console too.

    Of the others it is the file descriptors that are turned around, so that what C++ and a dying interpreter say stands
    there as well. A disk that refuses leaves all as it was.
    """
    path = directory / f"rank_{rank_info.rank:04d}_{re.sub(r'[^A-Za-z0-9._-]', '_', rank_info.node) or 'node'}.log"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115  open to the end
        job = f", job {rank_info.job}" if rank_info.job else ""
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()} on {rank_info.node}{job}\n")
    except OSError as error:
        print(f"WARNING: {path} could not be written: {error.strerror}; the run goes on", file=sys.stderr)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if rank_info.first:
        sys.stdout, sys.stderr = _Both(sys.stdout, file), _Both(sys.stderr, file)
    else:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class _Both:
    """A stream that also writes into a file, without what only a terminal understands."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        plain = _TERMINAL.sub("", text)
        if plain == text or not text.startswith("\x1b"):  # a progress bar drawn again is no news
            with suppress(OSError, ValueError):  # a full disk, or the interpreter's end
                self.file.write(plain)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
