"""A run of many ranks and their monitors on a simulated clock: work, barriers, lost messages, and one fault.

The real Member and Coordinator run with real reports and limits; only the processes, the clock and the network are
simulated. A turn is a second. Each rank measures time by its own clock, and clocks differ between nodes.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field

from rwkv_train.watchdog.verdict import (
    ANSWER_TIMEOUT,
    REPORT_SPREAD,
    REPORT_TIMEOUT,
    Coordinator,
    Limits,
    Member,
    Phase,
    RankReport,
    Verdict,
    phase_limit,
)

PER_NODE = 8
PHASES = (
    Phase.DATA,
    Phase.FORWARD,
    Phase.BACKWARD,
    Phase.OPTIMISER,
)  # of a step; in the last one ranks wait for each other
FAULTS = ("hang", "stop", "kill", "node", "stall", "hang", "stop", "kill", "node", "stall", "none", "gap")


@dataclass
class Rank:
    number: int
    clock: float  # offset of this node's clock
    step: int = 0
    phase: int = 0  # index into PHASES
    since: float = 0.0
    ended: str | None = None  # the process
    gone: bool = False  # with its monitor and its node
    state: str = "S"
    hung: bool = False
    stopped: float | None = None
    stall: bool = False  # the disk does not respond to a save
    verdict: Verdict | None = None  # that its monitor has received


@dataclass
class Schedule:
    """One run, and the fault in it.

    Args:
        seed: seed of all random choices.
        ranks: number of ranks.
        fault: one of FAULTS; "gap": the complete job is stopped for a while and continues.
    """

    seed: int
    ranks: int
    fault: str
    limits: Limits = field(default_factory=lambda: Limits(floor=20.0, checkpoint=40.0))

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.loss = self.draw.choice((0.0, 0.1, 0.3))
        self.pace = self.draw.uniform(0.5, 1.5)  # seconds of a step
        self.all = [Rank(number, self.draw.uniform(-1e6, 1e6)) for number in range(self.ranks)]
        self.members = {number: Member(number, self.all[number].clock) for number in range(1, self.ranks)}
        self.coordinator = Coordinator(self.ranks, self.limits, self.all[0].clock)
        self.culprits: set[int] = set()
        self.at = 0.0  # time of the fault
        self.ended_at: float | None = None

    @property
    def deadline(self) -> float:
        """Seconds from the fault to the end of every rank: the longest limit that may apply, and the messages."""
        longest = max(self.limits.floor, self.limits.factor * self.pace)
        longest = self.limits.checkpoint if self.fault == "stall" else longest
        return max(longest, REPORT_TIMEOUT + REPORT_SPREAD) + ANSWER_TIMEOUT + 5

    def run(self) -> None:
        """Until all ranks have ended, or nothing was wrong for long enough."""
        self.at = 2 + self.draw.random() * 5
        seconds = {"none": 50, "gap": 150}.get(self.fault, 150)
        suspended = range(0)
        if self.fault == "gap":
            suspended = range(int(self.at), int(self.at) + self.draw.randrange(20, 100))
        for second in range(seconds):
            now = float(second)
            if self.fault not in ("none", "gap") and not self.culprits and now >= self.at:
                self._inject_fault(now)
            if second in suspended:
                continue
            if suspended and second == suspended.stop:
                self._wake(now, len(suspended))
            self._train(now)
            self._watch(now)
            if all(rank.ended is not None for rank in self.all):
                self.ended_at = now
                return

    def _wake(self, now: float, seconds: int) -> None:
        """Each monitor notices by its own clock that it was stopped, as monitor.py does."""
        self.coordinator.discount(seconds)
        for member in self.members.values():
            member.discount(seconds)
        for rank in self.all:
            rank.since = now

    def _inject_fault(self, now: float) -> None:
        first = self.draw.randrange(self.ranks)
        self.culprits = {first}
        rank = self.all[first]
        if self.fault == "hang":
            rank.hung = True
        elif self.fault == "stop":
            rank.stopped = now
        elif self.fault == "kill":
            rank.ended = "it was killed"
        elif self.fault == "stall":
            rank.hung = rank.stall = True
            for other in self.all:  # the stall has an effect when all wait for their writers
                other.step, other.phase, other.since = rank.step + 1, 0, now
        elif self.fault == "node":
            begin = first // PER_NODE * PER_NODE
            self.culprits = set(range(begin, min(begin + PER_NODE, self.ranks)))
            for number in self.culprits:
                self.all[number].gone, self.all[number].ended = True, "its node"

    def _train(self, now: float) -> None:
        """Every rank that can goes to the next barrier, which opens when all are there."""
        stuck = [r for r in self.all if r.hung or r.stopped is not None or r.ended is not None]
        for rank in self.all:
            if rank in stuck or rank.stall:
                continue
            if rank.phase < len(PHASES) - 1:
                rank.phase, rank.since = (len(PHASES) - 1 if not stuck else rank.phase + 1), now
        waiting = self.fault == "stall" and bool(self.culprits)
        if not stuck and not waiting and all(rank.phase == len(PHASES) - 1 for rank in self.all):
            for rank in self.all:
                rank.step, rank.phase, rank.since = rank.step + 1, self.draw.randrange(len(PHASES) - 1), now

    def _report(self, rank: Rank, now: float) -> RankReport:
        stall = self.fault == "stall" and bool(self.culprits)
        phase = Phase.CHECKPOINT if stall else PHASES[rank.phase]
        halted = 0.0 if rank.stopped is None else now - rank.stopped
        return RankReport(
            rank.number,
            f"node{rank.number // PER_NODE}",
            rank.step,
            0 if stall else rank.phase,
            0,
            phase,
            in_phase=now - rank.since,
            limit=phase_limit(self.limits, phase, 100, self.pace),
            stopped=halted,
            frozen=halted,
            state="T" if halted else "D" if rank.stall else "S",
            saving=now - rank.since if rank.stall else 0.0,
            ended=rank.ended,
        )

    def _arrives(self) -> bool:
        return self.draw.random() >= self.loss

    def _watch(self, now: float) -> None:
        zero = self.all[0]
        if not zero.gone:
            self.coordinator.receive(self._report(zero, now), now + zero.clock)
        for number, member in self.members.items():
            rank = self.all[number]
            if rank.gone:
                continue
            report, own = self._report(rank, now), now + rank.clock
            if not zero.gone and self._arrives():
                self.coordinator.receive(report, now + zero.clock)
                verdict = self.coordinator.verdict
                if self._arrives():
                    member.receive({} if verdict is None else asdict(verdict), own)
            self._obey(rank, member.judge(own), now)
        if not zero.gone:
            self._obey(zero, self.coordinator.judge(now + zero.clock), now)

    def _obey(self, rank: Rank, verdict: Verdict | None, now: float) -> None:
        if verdict is not None and rank.verdict is None:
            rank.verdict = verdict
            if rank.ended is None:
                rank.ended, rank.gone = (
                    "76",
                    rank.number > 0,
                )  # its monitor ends with it; that of rank 0 continues to answer

    def wrong(self) -> str | None:
        """The violated requirement; None: all hold."""
        verdicts = [rank.verdict for rank in self.all if rank.verdict is not None]
        if self.fault in ("none", "gap"):
            return f"a verdict without a fault: {verdicts[0].reason}" if verdicts else None
        if self.ended_at is None:
            return "a silent hang"
        if self.ended_at - self.at > self.deadline:
            return f"ended {self.ended_at - self.at:.0f} s after the fault, {self.deadline:.0f} are the deadline"
        # a rank may have died before any of its reports arrived: its node is not known
        known = {number for number in self.culprits if self.coordinator._last[number].received}
        for verdict in verdicts:
            lost = self.fault == "node" and 0 in self.culprits and list(verdict.ranks) == [0]
            if set(verdict.ranks) not in (self.culprits, known) and not lost:
                return f"the culprits are {sorted(self.culprits)}, not: {verdict.reason}"
        return None


def schedule(seed: int) -> Schedule:
    """A size and a fault for each seed: mostly a few ranks, sometimes a thousand."""
    draw = random.Random(seed)
    ranks = draw.choice((2, 3, 4, 8, 9, 16, 17)) if seed % 500 else 1024
    fault = FAULTS[seed % len(FAULTS)] if seed % 500 else ("hang", "stop", "kill", "node")[seed // 500 % 4]
    return Schedule(seed, ranks, fault)
