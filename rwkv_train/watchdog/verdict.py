"""The watchdog's rules: from what each rank's monitor reports, which rank blocks the others for too long.

Each rank has a monitor, a process of its own (monitor.py), that observes its rank every second and reports to the
monitor of rank 0, the coordinator, whose answer carries the verdict once there is one. Reports and answers may be lost:
they are repeated as long as the run lasts. A verdict needs no clock but the coordinator's: only durations are reported.

In synchronous training every rank soon waits for the one that hangs, so being late does not show which one that is.
All ranks go through the same phases in the same order, and those that wait have come further than the one that they
wait for: the culprit is the rank that is furthest behind. A rank that is dead, silent or stopped is a culprit wherever
it is.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

REPORT_TIMEOUT = 15.0  # seconds without a report after which a rank counts as lost
REPORT_SPREAD = 10.0  # seconds more: ranks that were lost together are then named together, whichever reported last
ANSWER_TIMEOUT = 30.0  # seconds without an answer after which a monitor decides alone: the coordinator must be first
FROZEN_AFTER = 5.0  # seconds without activity of any thread after which a process counts as frozen
EXIT_GRACE = 5.0  # seconds in which the other ranks may notice by themselves that a rank has ended
MIN_STEPS_FOR_MEAN = 5
_TYPES: dict[str, tuple[type, ...]] = {  # of a report's fields in a message
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "str | None": (str, type(None)),
}
_MAX_NUMBER = 1e15  # in a message; NaN is not below it either


class Phase(IntEnum):
    """What a rank is doing."""

    STARTUP = 0  # until the first step begins
    DATA = 1  # between two steps: records, the next batch
    FORWARD = 2
    BACKWARD = 3
    OPTIMISER = 4  # the rank's own gradients are complete: all-reduce, clipping, the update
    VALIDATION = 5
    CHECKPOINT = 6
    END = 7  # after the last step

    @property
    def label(self) -> str:
        return {Phase.STARTUP: "start-up", Phase.OPTIMISER: "all-reduce and optimiser"}.get(self, self.name.lower())


@dataclass(frozen=True)
class Limits:
    """How long a rank may stay in one phase, in seconds unless noted otherwise.

    Attributes:
        factor: limit of the phases of a step, as a multiple of the mean step time.
        floor: least limit of the phases of a step.
        startup: limit of the start-up.
        first_step: limit of the phases of the first steps, before a mean is known.
        checkpoint: limit of a wait for a checkpoint.
        validation: limit of a batch of the validation.
    """

    factor: float = 10.0
    floor: float = 60.0
    startup: float = 1800.0
    first_step: float = 1800.0
    checkpoint: float = 1800.0
    validation: float = 1800.0


@dataclass(frozen=True)
class RankReport:
    """The state of a rank as its monitor sees it; durations in seconds.

    Attributes:
        rank: number of the rank.
        node: name of its node.
        step: finished optimiser steps.
        phase_number: how many phases of the step came before this one; all ranks go through the same ones.
        index: number of the micro-batch, or of the validation batch.
        phase: the current phase, a Phase.
        in_phase: time since the last progress, a new phase or batch.
        limit: how long that may be.
        stopped: time for which the process has been stopped by a signal; 0: it is not.
        frozen: time since any thread of the process ran.
        state: state of the process as the kernel names it: R, S, D, T …
        saving: time for which a checkpoint has been on its way to the disk; 0: none is.
        work: time of the rank's own work in its last step, without waiting for other ranks.
        ended: None while it runs; "" after a normal end, else the reason.
    """

    rank: int
    node: str = ""
    step: int = 0
    phase_number: int = 0
    index: int = 0
    phase: int = Phase.STARTUP
    in_phase: float = 0.0
    limit: float = 1800.0
    stopped: float = 0.0
    frozen: float = 0.0
    state: str = "S"
    saving: float = 0.0
    work: float = 0.0
    ended: str | None = None

    @classmethod
    def parse(cls, message: Mapping[str, Any], ranks: int) -> RankReport | None:
        """The report in a message to the coordinator of so many ranks; None: the message is no valid report."""
        try:
            report = cls(**message)
        except TypeError:
            return None
        for own in fields(cls):
            value = getattr(report, own.name)
            if not isinstance(value, _TYPES[str(own.type)]):
                return None
            if isinstance(value, (int, float)) and not abs(value) < _MAX_NUMBER:
                return None
        return report if report.rank in range(ranks) and report.phase in list(Phase) else None

    @property
    def position(self) -> tuple[int, int, int]:
        """How far the rank has come."""
        return self.step, self.phase_number, self.index


@dataclass(frozen=True)
class Verdict:
    """Why a run ends.

    Attributes:
        ranks: the culprits.
        step: finished steps of the first of them.
        reason: who, where, in which phase, for how long.
    """

    ranks: Sequence[int]
    step: int
    reason: str

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> Verdict | None:
        """The verdict in an answer of the coordinator; None: it holds none."""
        ranks, step, reason = (message.get(name) for name in ("ranks", "step", "reason"))
        if not (isinstance(ranks, list) and isinstance(step, int) and isinstance(reason, str)):
            return None
        return cls(ranks, step, reason) if all(isinstance(rank, int) for rank in ranks) else None


def phase_limit(limits: Limits, phase: int, steps: int, step_time: float) -> float:
    """How long a rank may stay in a phase, in seconds; for the phases of a step it follows from the run itself.

    Args:
        limits: the settings.
        phase: the phase.
        steps: number of steps that this process has done.
        step_time: mean time of the last steps, in seconds.
    """
    fixed = {
        Phase.STARTUP: limits.startup,
        Phase.CHECKPOINT: limits.checkpoint,
        Phase.VALIDATION: limits.validation,
        Phase.END: limits.checkpoint,
    }
    if phase in fixed:
        return fixed[Phase(phase)]
    return limits.first_step if steps < MIN_STEPS_FOR_MEAN else max(limits.floor, limits.factor * step_time)


@dataclass
class _LastReport:
    """The newest report of a rank, when it came by the coordinator's clock, and whether it is a real one."""

    report: RankReport
    at: float
    received: bool = False


@dataclass
class Coordinator:
    """Judges all ranks of a run.

    Args:
        ranks: number of ranks.
        limits: limits of ranks that have not reported yet, and of stopped ones.
        now: seconds by any monotonic clock; the same clock in all calls.
        verdict: the verdict, once there is one.
    """

    ranks: int
    limits: Limits
    now: float
    verdict: Verdict | None = None
    _last: dict[int, _LastReport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = {rank: _LastReport(RankReport(rank), self.now) for rank in range(self.ranks)}

    def receive(self, report: RankReport, now: float) -> None:
        """Takes the report of a rank; one that arrives late, after a newer one, does no harm."""
        before = self._last[report.rank]
        if before.report.ended is None:
            self._last[report.rank] = _LastReport(report, now, received=True)

    def discount(self, seconds: float) -> None:
        """The coordinator itself was stopped for so long: that time is not counted as silence of the ranks."""
        for last in self._last.values():
            last.at += seconds

    def judge(self, now: float) -> Verdict | None:
        """The verdict, which is final once there is one; None: no rank exceeds a limit."""
        if self.verdict is None:
            self.verdict = self._judge(now)
        return self.verdict

    @property
    def over(self) -> bool:
        """Whether every rank has ended."""
        return all(last.report.ended is not None for last in self._last.values())

    @property
    def reports(self) -> dict[int, RankReport]:
        """The newest reports of the running ranks."""
        return {rank: last.report for rank, last in self._last.items() if last.received and last.report.ended is None}

    def _judge(self, now: float) -> Verdict | None:
        unfinished = [last for last in self._last.values() if last.report.ended != ""]
        running = [last for last in unfinished if last.report.ended is None]
        died = [last.report for last in unfinished if last.report.ended is not None and now - last.at > EXIT_GRACE]
        if died and running:
            return self._against(died, lambda report: f"has ended: {report.ended}")
        silent = [
            (now - (last.at if last.received else last.at + self.limits.startup), last.report) for last in running
        ]
        if any(seconds > REPORT_TIMEOUT + REPORT_SPREAD for seconds, _ in silent):
            lost = [report for seconds, report in silent if seconds > REPORT_TIMEOUT]
            return self._against(lost, lambda report: f"is lost: no report from its node for {REPORT_TIMEOUT:.0f} s")
        reports = [last.report for last in running if last.received]
        stopped = [report for report in reports if report.stopped > self.limits.floor]
        if stopped:
            return self._against(
                stopped, lambda report: f"has been stopped for {report.stopped:.0f} s ({_location(report)})"
            )
        behind = furthest_behind(reports)
        if not behind or any(report.in_phase <= report.limit for report in behind):
            return None
        return self._against(behind, lambda report: f"hangs: {_location(report)} for {_duration(report)}")

    def _against(self, reports: Sequence[RankReport], why: Callable[[RankReport], str]) -> Verdict:
        """The verdict against these ranks."""
        first = min(reports, key=lambda report: report.rank)
        others = f", and {len(reports) - 1} more ranks" if len(reports) > 1 else ""
        waiting = self.ranks - len(reports)
        waits = f"; {waiting} ranks wait" if waiting > 1 else "; the other rank waits" if waiting else ""
        node = f" on {first.node}" if first.node else ""
        reason = f"rank {first.rank}{node}{others} {why(first)}{waits}"
        return Verdict([report.rank for report in reports], first.step, reason)


def furthest_behind(reports: Iterable[RankReport]) -> list[RankReport]:
    """The ranks that all others wait for; of several at the same position, those with further signs of a fault."""
    reports = list(reports)
    least = min((report.position for report in reports), default=None)
    behind = [report for report in reports if report.position == least]
    signs = [
        {report.rank for report in behind if report.frozen > FROZEN_AFTER},
        {report.rank for report in behind if report.state == "D"},
        {report.rank for report in behind if report.phase == Phase.CHECKPOINT and report.saving > 0},
    ]
    for sign in signs:
        marked = [report for report in behind if report.rank in sign]
        if marked and len(marked) < len(behind):
            return marked
    return behind


def _location(report: RankReport) -> str:
    return f"{Phase(report.phase).label} of step {report.step + (report.phase != Phase.END)}"


def _duration(report: RankReport) -> str:
    if report.state == "D":
        detail = "inside the kernel: a disk, a network file system or a device does not respond"
    elif report.frozen > FROZEN_AFTER:
        detail = "none of its threads runs"
    else:
        detail = f"limit {report.limit:.0f} s"
    return f"{report.in_phase:.0f} s ({detail})"


class Member:
    """A monitor's side of the exchange with the coordinator: without answers for too long, it ends its rank itself.

    Args:
        rank: number of its rank.
        now: seconds by this monitor's own monotonic clock; the same clock in all calls.

    Attributes:
        verdict: the verdict, once there is one.
        released: whether rank 0 has ended normally, so that no answers come any more.
    """

    def __init__(self, rank: int, now: float) -> None:
        self.rank = rank
        self.verdict: Verdict | None = None
        self.released = False
        self._answered = now

    def receive(self, answer: Mapping[str, Any], now: float) -> None:
        """Takes an answer of the coordinator: {} if nothing is wrong, a verdict, or {"release"}: rank 0 has ended."""
        self._answered = now
        if "release" in answer:
            self.released = True
        if self.verdict is None:
            self.verdict = Verdict.parse(answer)

    def discount(self, seconds: float) -> None:
        """This monitor itself was stopped for so long: that time is not counted as silence of the coordinator."""
        self._answered += seconds

    def judge(self, now: float) -> Verdict | None:
        if self.verdict is None and not self.released and now - self._answered > ANSWER_TIMEOUT:
            reason = f"rank 0 is lost: no answer from its node to rank {self.rank} for {ANSWER_TIMEOUT:.0f} s"
            self.verdict = Verdict([0], 0, reason)
        return self.verdict


class Stragglers:
    """Finds ranks whose own work takes longer than the others', step after step.

    Args:
        factor: a straggler takes at least this many times the median of the other ranks.
        steps: for this many steps in a row.
    """

    def __init__(self, factor: float, steps: int) -> None:
        self.factor, self.steps = factor, steps
        self._recent: dict[int, deque[float]] = {}
        self._since: dict[int, int] = {}
        self._named: set[int] = set()

    def update(self, reports: Mapping[int, RankReport]) -> list[tuple[RankReport, float]]:
        """Takes the newest report of each rank.

        Returns:
            new stragglers with how many times as long they take; a rank again only after it has recovered.
        """
        for rank, report in reports.items():
            recent = self._recent.setdefault(rank, deque(maxlen=9))
            if report.work > 0:
                recent.append(report.work)
        medians = {rank: statistics.median(self._recent[rank]) for rank in reports if self._recent[rank]}
        if len(medians) < 2:
            return []
        named = []
        for rank, own in medians.items():
            usual = statistics.median([other for number, other in medians.items() if number != rank])
            if own <= self.factor * usual:
                self._since.pop(rank, None)
                self._named.discard(rank)
                continue
            step = reports[rank].step
            if step - self._since.setdefault(rank, step) >= self.steps and rank not in self._named:
                self._named.add(rank)
                named.append((reports[rank], own / usual))
        return named
