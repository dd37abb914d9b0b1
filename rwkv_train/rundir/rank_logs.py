"""A log file for each rank; only rank 0 prints to the console."""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rwkv_train.cluster.rank_info import RankInfo

_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\r")  # colours and cursor movements


def keep_log(directory: Path, rank_info: RankInfo) -> None:
    """Sends what this rank prints to `directory/rank_0003_NODE.log` from now on; rank 0 prints to its console too.

    On the other ranks the file descriptors are redirected, so that messages of C++ code and of a crashing interpreter
    are in the log as well. If the disk refuses the file, nothing is redirected.
    """
    path = directory / f"rank_{rank_info.rank:04d}_{re.sub(r'[^A-Za-z0-9._-]', '_', rank_info.node) or 'node'}.log"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115  stays open
        job = f", job {rank_info.job}" if rank_info.job else ""
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()} on {rank_info.node}{job}\n")
    except OSError as error:
        print(f"WARNING: {path} could not be written: {error.strerror}; training continues", file=sys.stderr)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if rank_info.first:
        sys.stdout, sys.stderr = _Tee(sys.stdout, file), _Tee(sys.stderr, file)
    else:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class _Tee:
    """A stream that is also written to a file, without terminal control sequences."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        plain = _TERMINAL.sub("", text)
        if plain == text or not text.startswith("\x1b"):  # a redrawn progress bar is not logged
            with suppress(OSError, ValueError):  # a full disk, or the interpreter is shutting down
                self.file.write(plain)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
