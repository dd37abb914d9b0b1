"""The watchdog's judgement: from what each rank reports of itself, who keeps the others waiting, and for too long.

Each rank has a guard, a process of its own (guard.py), that looks at its rank every second and reports to the first
rank's guard, the coordinator, whose answer carries the verdict once there is one. Reports and answers may be lost: they
are repeated as long as the run goes on. A verdict needs no clock but the judge's own: what is reported are durations.

In synchronous training everybody soon waits for the rank that hangs, so being late tells nothing. Guilty is who is
behind: all ranks go through the same places in the same order, and those that wait have come further than the one that
does not come. Who is dead, silent or stopped is guilty whatever its place.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

SILENCE = 15.0  # seconds without a report after which a rank counts as lost
SPREAD = 10.0  # seconds more, so that all that were lost together are named together, whoever was heard last
ALONE = 30.0  # seconds without an answer after which a guard decides by itself: the coordinator is to be first
FROZEN = 5.0  # seconds without a sign of any thread of a process after which it counts as frozen
GRACE = 5.0  # seconds in which the others may notice by themselves that a rank has ended
LEARNED = 5  # steps that make a mean


class Phase(IntEnum):
    """What a rank is doing."""

    STARTUP = 0  # until the first step begins
    DATA = 1  # between two steps: records, the next batch
    FORWARD = 2
    BACKWARD = 3
    OPTIMISER = 4  # its own gradients are there: all-reduce, clipping, the update
    VALIDATION = 5
    CHECKPOINT = 6
    END = 7  # behind the last step

    @property
    def told(self) -> str:
        return {Phase.STARTUP: "start-up", Phase.OPTIMISER: "all-reduce and optimiser"}.get(self, self.name.lower())


@dataclass(frozen=True)
class Limits:
    """Seconds that a rank may stay in one place.

    Args:
        factor: of the mean step: what the place of a step may take.
        floor: what it may take in any case.
        startup, first_step, checkpoint, validation: of these.
    """

    factor: float = 10.0
    floor: float = 60.0
    startup: float = 1800.0
    first_step: float = 1800.0
    checkpoint: float = 1800.0
    validation: float = 1800.0


@dataclass(frozen=True)
class Report:
    """How a rank is, as its guard sees it.

    Args:
        rank, node: whose.
        step: finished optimiser steps.
        place: of the program within the step; all ranks go through the same ones.
        index: of the micro-batch, or of the validation's batch.
        phase: what is done there.
        still: seconds since it came there.
        limit: seconds that it may stay there.
        stopped: seconds that the process has been stopped by a signal.
        frozen: seconds since any thread of it ran.
        state: of the process, as the kernel names it: R, S, D, T …
        writing: seconds that a checkpoint has been on its way to the disk; 0: none is.
        work: seconds of its own work in its last step, waiting for others left out.
        ended: None while it runs; "" when it came to its end, else why not.
    """

    rank: int
    node: str = ""
    step: int = 0
    place: int = 0
    index: int = 0
    phase: int = Phase.STARTUP
    still: float = 0.0
    limit: float = 1800.0
    stopped: float = 0.0
    frozen: float = 0.0
    state: str = "S"
    writing: float = 0.0
    work: float = 0.0
    ended: str | None = None

    @property
    def position(self) -> tuple[int, int, int]:
        return self.step, self.place, self.index

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Why a run ends.

    Args:
        ranks: the guilty ones.
        step: finished steps of the first of them.
        reason: for people: who, where, doing what, for how long.
    """

    ranks: Sequence[int]
    step: int
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {"ranks": list(self.ranks), "step": self.step, "reason": self.reason}


def limit(limits: Limits, phase: int, steps: int, pace: float) -> float:
    """Seconds that a rank may stay in a place: for steps learned from the run itself.

    Args:
        limits: the settings.
        phase: what is done there.
        steps: that this process has done.
        pace: seconds of one, the mean of the last ones.
    """
    own = {
        Phase.STARTUP: limits.startup,
        Phase.CHECKPOINT: limits.checkpoint,
        Phase.VALIDATION: limits.validation,
        Phase.END: limits.checkpoint,
    }
    if phase in own:
        return own[Phase(phase)]
    return limits.first_step if steps < LEARNED else max(limits.floor, limits.factor * pace)


@dataclass
class _Heard:
    report: Report
    at: float  # when, by the coordinator's clock
    told: bool = False  # whether the rank was heard at all


@dataclass
class Coordinator:
    """Judges a run of so many ranks.

    Args:
        ranks: of the run.
        limits: for those that have not been heard yet, and of who is stopped.
        now: seconds by any clock that only goes on; those of the other calls too.
    """

    ranks: int
    limits: Limits
    now: float
    verdict: Verdict | None = None
    _heard: dict[int, _Heard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._heard = {rank: _Heard(Report(rank), self.now) for rank in range(self.ranks)}

    def hear(self, report: Report, now: float) -> None:
        """A rank's report; one that comes late, behind a newer one, does no harm."""
        before = self._heard[report.rank]
        if before.report.ended is None:
            self._heard[report.rank] = _Heard(report, now, told=True)

    def skip(self, seconds: float) -> None:
        """The coordinator itself was stopped for so long: nobody was silent because of that."""
        for heard in self._heard.values():
            heard.at += seconds

    def judge(self, now: float) -> Verdict | None:
        """The verdict, which stays once there is one; None: nothing is wrong, or not for long enough."""
        if self.verdict is None:
            self.verdict = self._judge(now)
        return self.verdict

    @property
    def over(self) -> bool:
        """Whether every rank has ended."""
        return all(heard.report.ended is not None for heard in self._heard.values())

    @property
    def reports(self) -> dict[int, Report]:
        """The newest ones of the ranks that run."""
        return {rank: h.report for rank, h in self._heard.items() if h.told and h.report.ended is None}

    def _judge(self, now: float) -> Verdict | None:
        running = [heard for heard in self._heard.values() if heard.report.ended != ""]
        left = [heard for heard in running if heard.report.ended is None]
        died = [heard.report for heard in running if heard.report.ended is not None and now - heard.at > GRACE]
        if died and left:
            return self._guilty(died, lambda report: f"has ended: {report.ended}")
        silent = [(now - (heard.at if heard.told else heard.at + self.limits.startup), heard.report) for heard in left]
        lost = [report for seconds, report in silent if seconds > SILENCE]
        if any(seconds > SILENCE + SPREAD for seconds, _ in silent):
            return self._guilty(lost, lambda report: f"has not been heard for {SILENCE:.0f} s, nor its node's watchdog")
        told = [heard.report for heard in left if heard.told]
        stopped = [report for report in told if report.stopped > self.limits.floor]
        if stopped:
            return self._guilty(stopped, lambda one: f"has been stopped for {one.stopped:.0f} s ({_doing(one)})")
        behind = furthest_behind(told)
        if not behind or any(report.still <= report.limit for report in behind):
            return None
        return self._guilty(behind, lambda report: f"does not get on: {_doing(report)} for {_late(report)}")

    def _guilty(self, reports: Sequence[Report], why: Any) -> Verdict:
        first = min(reports, key=lambda report: report.rank)
        others = f", and {len(reports) - 1} more ranks" if len(reports) > 1 else ""
        waiting = self.ranks - len(reports)
        waits = f"; {waiting} wait" if waiting > 1 else "; the other one waits" if waiting else ""
        node = f" on {first.node}" if first.node else ""
        reason = f"rank {first.rank}{node}{others} {why(first)}{waits}"
        return Verdict([report.rank for report in reports], first.step, reason)


def furthest_behind(reports: Iterable[Report]) -> list[Report]:
    """Those that all others wait for; of several at the same place, those that something else speaks against."""
    reports = list(reports)
    least = min((report.position for report in reports), default=None)
    behind = [report for report in reports if report.position == least]
    signs = [
        {report.rank for report in behind if report.frozen > FROZEN},
        {report.rank for report in behind if report.state == "D"},
        {report.rank for report in behind if report.phase == Phase.CHECKPOINT and report.writing > 0},
    ]
    for sign in signs:
        marked = [report for report in behind if report.rank in sign]
        if marked and len(marked) < len(behind):
            return marked
    return behind


def _doing(report: Report) -> str:
    return f"{Phase(report.phase).told} of step {report.step + (report.phase != Phase.END)}"


def _late(report: Report) -> str:
    if report.state == "D":
        state = "inside the kernel: a disk, a network file system or a device does not answer"
    else:
        state = "no thread of it runs" if report.frozen > FROZEN else f"{report.limit:.0f} s are its limit"
    return f"{report.still:.0f} s ({state})"


class Member:
    """A guard's side of the talk with the coordinator: when it has been left alone for too long, its rank ends too.

    Args:
        rank: whose guard.
        now: as of the coordinator, by this guard's own clock.
    """

    def __init__(self, rank: int, now: float) -> None:
        self.rank = rank
        self._answered, self.released = now, False
        self.verdict: Verdict | None = None

    def hear(self, answer: Mapping[str, Any], now: float) -> None:
        """The coordinator's answer: {} while all is well, a verdict, or {"bye"} when its own rank came to its end."""
        self._answered = now
        if "bye" in answer:
            self.released = True
        if "reason" in answer and self.verdict is None:
            self.verdict = Verdict(answer["ranks"], answer["step"], answer["reason"])

    def skip(self, seconds: float) -> None:
        """This guard itself was stopped for so long."""
        self._answered += seconds

    def judge(self, now: float) -> Verdict | None:
        if self.verdict is None and not self.released and now - self._answered > ALONE:
            reason = f"rank 0's watchdog has not answered rank {self.rank}'s for {ALONE:.0f} s: its node is lost"
            self.verdict = Verdict([0], 0, reason)
        return self.verdict


class Stragglers:
    """Names the rank whose own work takes longer than the others', step after step.

    Args:
        factor: times the median of all ranks.
        steps: for so many steps in a row.
    """

    def __init__(self, factor: float, steps: int) -> None:
        self.factor, self.steps = factor, steps
        self._recent: dict[int, deque[float]] = {}
        self._since: dict[int, int] = {}
        self._named: set[int] = set()

    def hear(self, reports: Mapping[int, Report]) -> list[tuple[Report, float]]:
        """Takes what the ranks report.

        Returns:
            who is named now, and how many times as long it works; nobody twice, unless it has recovered between.
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
