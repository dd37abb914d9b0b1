"""A run of many ranks and their guards by a fake clock: work, barriers, lost messages, and one thing that goes wrong.

The guards are the real Member and Coordinator with the real reports and limits; only the processes, the clock and the
network are made up. A second is a turn. All times that a rank measures are its own: clocks differ between nodes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from rwkv_train.watchdog.verdict import (
    ALONE,
    SILENCE,
    SPREAD,
    Coordinator,
    Limits,
    Member,
    Phase,
    Report,
    Verdict,
    limit,
)

PER_NODE = 8
PLACES = (
    Phase.DATA,
    Phase.FORWARD,
    Phase.BACKWARD,
    Phase.OPTIMISER,
)  # of a step; in the last the others are waited for
FAULTS = ("hang", "stop", "kill", "node", "stall", "hang", "stop", "kill", "node", "stall", "none", "gap")


@dataclass
class Rank:
    number: int
    clock: float  # what this node's clock is ahead
    step: int = 0
    place: int = 0
    since: float = 0.0
    ended: str | None = None  # the process
    gone: bool = False  # with its guard and its node
    state: str = "S"
    hung: bool = False
    stopped: float | None = None
    stall: bool = False  # a checkpoint that is not taken by the disk
    verdict: Verdict | None = None  # that its guard has heard


@dataclass
class Schedule:
    """One run, and what goes wrong in it.

    Args:
        seed: of everything.
        ranks: how many.
        fault: one of FAULTS; "gap": the whole job is stopped for a while and goes on.
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
        self.guilty: set[int] = set()
        self.at = 0.0  # when it goes wrong
        self.ended_at: float | None = None

    @property
    def deadline(self) -> float:
        """Seconds from the fault to the end of every rank: the longest limit that may hold, and what telling takes."""
        longest = max(self.limits.floor, self.limits.factor * self.pace)
        longest = self.limits.checkpoint if self.fault == "stall" else longest
        return max(longest, SILENCE + SPREAD) + ALONE + 5

    def run(self) -> None:
        """Until all ranks have ended, or nothing was wrong for long enough."""
        self.at = 2 + self.draw.random() * 5
        seconds = {"none": 50, "gap": 150}.get(self.fault, 150)
        suspended = range(0)
        if self.fault == "gap":
            suspended = range(int(self.at), int(self.at) + self.draw.randrange(20, 100))
        for second in range(seconds):
            now = float(second)
            if self.fault not in ("none", "gap") and not self.guilty and now >= self.at:
                self._go_wrong(now)
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
        """Each guard sees by its own clock that it was stopped, as guard.py does."""
        self.coordinator.skip(seconds)
        for member in self.members.values():
            member.skip(seconds)
        for rank in self.all:
            rank.since = now

    def _go_wrong(self, now: float) -> None:
        first = self.draw.randrange(self.ranks)
        self.guilty = {first}
        rank = self.all[first]
        if self.fault == "hang":
            rank.hung = True
        elif self.fault == "stop":
            rank.stopped = now
        elif self.fault == "kill":
            rank.ended = "it was killed"
        elif self.fault == "stall":
            rank.hung = rank.stall = True
            for other in self.all:  # the stall shows when all wait for their writers
                other.step, other.place, other.since = rank.step + 1, 0, now
        elif self.fault == "node":
            begin = first // PER_NODE * PER_NODE
            self.guilty = set(range(begin, min(begin + PER_NODE, self.ranks)))
            for number in self.guilty:
                self.all[number].gone, self.all[number].ended = True, "its node"

    def _train(self, now: float) -> None:
        """Everybody that can goes to the next barrier; the barrier opens when all are there."""
        stuck = [r for r in self.all if r.hung or r.stopped is not None or r.ended is not None]
        for rank in self.all:
            if rank in stuck or rank.stall:
                continue
            if rank.place < len(PLACES) - 1:
                rank.place, rank.since = (len(PLACES) - 1 if not stuck else rank.place + 1), now
        waiting = self.fault == "stall" and bool(self.guilty)
        if not stuck and not waiting and all(rank.place == len(PLACES) - 1 for rank in self.all):
            for rank in self.all:
                rank.step, rank.place, rank.since = rank.step + 1, self.draw.randrange(len(PLACES) - 1), now

    def _report(self, rank: Rank, now: float) -> Report:
        stall = self.fault == "stall" and bool(self.guilty)
        phase = Phase.CHECKPOINT if stall else PLACES[rank.place]
        halted = 0.0 if rank.stopped is None else now - rank.stopped
        return Report(
            rank.number,
            f"node{rank.number // PER_NODE}",
            rank.step,
            0 if stall else rank.place,
            0,
            phase,
            still=now - rank.since,
            limit=limit(self.limits, phase, 100, self.pace),
            stopped=halted,
            frozen=halted,
            state="T" if halted else "D" if rank.stall else "S",
            writing=now - rank.since if rank.stall else 0.0,
            ended=rank.ended,
        )

    def _arrives(self) -> bool:
        return self.draw.random() >= self.loss

    def _watch(self, now: float) -> None:
        zero = self.all[0]
        if not zero.gone:
            self.coordinator.hear(self._report(zero, now), now + zero.clock)
        for number, member in self.members.items():
            rank = self.all[number]
            if rank.gone:
                continue
            report, own = self._report(rank, now), now + rank.clock
            if not zero.gone and self._arrives():
                self.coordinator.hear(report, now + zero.clock)
                verdict = self.coordinator.verdict
                if self._arrives():
                    member.hear({} if verdict is None else verdict.as_json(), own)
            self._obey(rank, member.judge(own), now)
        if not zero.gone:
            self._obey(zero, self.coordinator.judge(now + zero.clock), now)

    def _obey(self, rank: Rank, verdict: Verdict | None, now: float) -> None:
        if verdict is not None and rank.verdict is None:
            rank.verdict = verdict
            if rank.ended is None:
                rank.ended, rank.gone = "76", rank.number > 0  # its guard ends with it, the first one's answers on

    def wrong(self) -> str | None:
        """What must not be; None: all is as it has to be."""
        verdicts = [rank.verdict for rank in self.all if rank.verdict is not None]
        if self.fault in ("none", "gap"):
            return f"nothing was wrong, and yet: {verdicts[0].reason}" if verdicts else None
        if self.ended_at is None:
            return "a silent hang"
        if self.ended_at - self.at > self.deadline:
            return f"ended {self.ended_at - self.at:.0f} s after the fault, {self.deadline:.0f} are the deadline"
        # a rank that died before any of its words came through: nobody knows which node it was on
        heard = {number for number in self.guilty if self.coordinator._heard[number].told}
        for verdict in verdicts:
            lost = self.fault == "node" and 0 in self.guilty and list(verdict.ranks) == [0]
            if set(verdict.ranks) not in (self.guilty, heard) and not lost:
                return f"guilty is {sorted(self.guilty)}, and not: {verdict.reason}"
        return None


def schedule(seed: int) -> Schedule:
    """A size and a fault for each seed: mostly a few ranks, now and then a thousand."""
    draw = random.Random(seed)
    ranks = draw.choice((2, 3, 4, 8, 9, 16, 17)) if seed % 500 else 1024
    fault = FAULTS[seed % len(FAULTS)] if seed % 500 else ("hang", "stop", "kill", "node")[seed // 500 % 4]
    return Schedule(seed, ranks, fault)
