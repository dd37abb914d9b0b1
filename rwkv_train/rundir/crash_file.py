"""What a process of a run writes when it dies of a fault such as SIGBUS or SIGSEGV, which no Python code can handle."""

from __future__ import annotations

import faulthandler
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rwkv_train.json_files import read_regular

_NAME = re.compile(r"crash_rank_(\d{4,})\.txt")
_FIRST_LINE = "Fatal Python error: "
_CAUSES = {"Bus error": "a file that it had mapped was truncated, or the file system could not read it"}


@dataclass(frozen=True)
class Crash:
    """The end of a process of an earlier attempt.

    Attributes:
        rank: of the process.
        reason: of its end.
        file: with the stacks of its threads.
    """

    rank: int
    reason: str
    file: Path


@contextmanager
def crash_file(directory: Path, rank: int) -> Iterator[None]:
    """A fault in the block writes the stacks of all threads to `directory/crash_rank_0003.txt`; no fault, no file.

    If the disk refuses the file, they are printed on standard error, as they are outside of the block.
    """
    path = directory / f"crash_rank_{rank:04d}.txt"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(path, "wb")  # noqa: SIM115
    except OSError:
        yield
        return
    with file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            report_faults()
            with suppress(OSError):
                path.unlink()


def report_faults() -> None:
    """A fault prints the stacks of all threads on standard error from now on."""
    if sys.__stderr__ is not None:
        with suppress(OSError, ValueError):  # it is closed
            faulthandler.enable(sys.__stderr__)


def take_crashes(directory: Path, attempt: int) -> list[Crash]:
    """The crashes of the attempt before this one; their files get this attempt's number, so that none is found again.

    Args:
        directory: of `crash_file`.
        attempt: number of this attempt.
    """
    found = []
    for path in sorted(directory.glob("crash_rank_*.txt")):
        name = _NAME.fullmatch(path.name)
        if name is None:
            continue
        with suppress(OSError, ValueError):
            content = read_regular(path).decode(errors="replace")
            if not content:  # killed from outside
                path.unlink()
                continue
            kept = path.with_name(f"{path.stem}-before-attempt-{attempt:04d}.txt")
            path.rename(kept)
            reason = content.splitlines()[0].removeprefix(_FIRST_LINE)[:200]
            cause = f" ({_CAUSES[reason]})" if reason in _CAUSES else ""
            found.append(Crash(int(name[1]), reason + cause, kept))
    return found
