"""The exit codes of `train`: what each means, and whether the same command is worth starting again.

docs/slurm.md has the table, and a test holds it equal to this file. Standard library only: the watchdog's monitor,
which imports nothing else, ends processes with one of them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class ExitCode(IntEnum):
    """An exit code of a run.

    Attributes:
        meaning: what has happened, as in the documentation.
        restart: whether whatever starts the processes should start them again: "no", or "yes" with the reason.
    """

    meaning: str
    restart: str

    def __new__(cls, code: int, meaning: str = "", restart: str = "") -> ExitCode:
        """A code with its documentation; with the number alone another name of the same code."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning, member.restart = meaning, restart
        return member

    FINISHED = 0, "the budget is reached", "no"
    USER_ERROR = 2, "an error in the settings, the data or the nodes", "no"
    WRITES_REFUSED = 3, "finished, but the disk refused a checkpoint or a record", "no"
    SUPERSEDED = 4, "a newer start of the same run has taken over", "no"
    UNHEALTHY = 5, "`health` has stopped the run", "no"
    GIVEN_UP = 6, "failed three times at one step", "no"
    STOPPED = 75, "stopped by a signal, with a checkpoint", "yes, the same command"  # EX_TEMPFAIL of sysexits.h
    HUNG = 76, "the watchdog has ended a run that hung", "yes, the same command"  # not 75: nothing has requeued the job
    INTERRUPTED = 130, "Ctrl-C before there was a step to finish, or a second one", "no"
    FAILED = 1, "an error, another rank that was lost, or a preflight without an answer", "yes"

    # of commands that answer a question (plan, doctor, verify, status, replay=): the answer is no
    NEGATIVE = 1


class Ending(NamedTuple):
    """How a run ended: its exit code, and what rank 0 prints (empty: nothing more)."""

    code: ExitCode
    message: str = ""
