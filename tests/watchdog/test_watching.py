"""Thousands of runs in which something goes wrong: each ends in time, by a verdict that names who is guilty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rwkv_train.watchdog import verdict
from rwkv_train.watchdog.verdict import Coordinator, Member, Report, Stragglers, furthest_behind
from tests.watchdog.watching import FAULTS, Schedule, schedule


def failures(seeds: range) -> Iterator[str]:
    for seed in seeds:
        one = schedule(seed)
        one.run()
        if (wrong := one.wrong()) is not None:
            yield f"seed {seed}, {one.ranks} ranks, {one.fault}: {wrong}"


def test_every_schedule_ends_by_the_right_verdict() -> None:
    assert list(failures(range(1, 301))) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nine_thousand_schedules() -> None:
    assert list(failures(range(1000, 10_000))) == []


@pytest.mark.parametrize("fault", ["hang", "stop", "kill", "node"])
def test_a_thousand_ranks(fault: str) -> None:
    one = Schedule(7, 1024, fault)
    one.run()
    assert one.wrong() is None


def late_is_guilty(reports: Any) -> list[Report]:
    """Who waits longest is late; but not guilty."""
    reports = list(reports)
    return [max(reports, key=lambda report: report.still)] if reports else []


def least_number_is_guilty(reports: Any) -> list[Report]:
    return list(reports)[:1]


def by_what_was_heard_last(self: Coordinator, report: Report, now: float) -> None:
    """A rank that was heard once is never lost."""
    hear(self, report, float("inf") if report.ended is None else now)


hear, judge = Coordinator.hear, Member.judge
BROKEN: list[tuple[Any, str, Callable[..., Any]]] = [
    (verdict, "furthest_behind", late_is_guilty),
    (verdict, "furthest_behind", least_number_is_guilty),
    (Coordinator, "hear", by_what_was_heard_last),
    (Coordinator, "skip", lambda self, seconds: None),
    (Member, "skip", lambda self, seconds: None),
    (Member, "judge", lambda self, now: self.verdict),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_broken_rule_is_seen(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, instead = BROKEN[number]
    monkeypatch.setattr(where, name, instead)
    assert any(failures(range(1, 301)))


@pytest.mark.parametrize("constants", [{"SILENCE": 2.0, "SPREAD": 0.0}, {"SPREAD": 0.0}, {"ALONE": 5.0}])
def test_too_little_patience_is_seen(constants: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are lost: two seconds without one mean nothing."""
    for name, value in constants.items():
        monkeypatch.setattr(verdict, name, value)
    assert any(failures(range(1, 301)))


def test_all_faults_are_among_them() -> None:
    assert {schedule(seed).fault for seed in range(1, 301)} == set(FAULTS)


def test_of_several_at_one_place_something_else_decides() -> None:
    alike = [Report(rank, step=4, place=2, still=9.0, phase=6) for rank in range(4)]
    assert furthest_behind(alike) == alike
    frozen = Report(2, step=4, place=2, frozen=30.0)
    assert furthest_behind([*alike[:2], frozen]) == [frozen]
    writing = Report(3, step=4, place=2, phase=6, writing=12.0)
    assert furthest_behind([*alike[:3], writing]) == [writing]
    behind = Report(7, step=3, place=9)
    assert furthest_behind([*alike, frozen, behind]) == [behind]


def test_a_rank_that_may_take_its_time_is_waited_for() -> None:
    """Rank 1 is in a long checkpoint, rank 0 has waited for it for longer than a step may take."""
    judge = Coordinator(2, verdict.Limits(), 0.0)
    judge.hear(Report(0, step=5, place=2, phase=2, still=400.0, limit=60.0), 0.0)
    judge.hear(Report(1, step=5, place=1, phase=6, still=400.0, limit=1800.0), 0.0)
    assert judge.judge(1.0) is None
    judge.hear(Report(1, "there", step=5, place=1, phase=6, still=1900.0, limit=1800.0), 0.0)
    decision = judge.judge(1.0)
    assert decision is not None
    assert decision.reason == (
        "rank 1 on there does not get on: checkpoint of step 6 for 1900 s (1800 s are its limit); the other one waits"
    )


def test_a_straggler_is_named_once_and_again_after_it_has_recovered() -> None:
    slow, named = Stragglers(1.5, 20), []

    def steps(first: int, last: int, work: float) -> None:
        for step in range(first, last):
            reports = {
                rank: Report(rank, step=step, work=work if rank == 3 else 0.1 + 0.001 * rank) for rank in range(8)
            }
            named.extend((report.rank, step) for report, _ in slow.hear(reports))

    steps(1, 100, 0.1)
    assert named == []
    steps(100, 110, 0.3)  # not for long enough
    steps(110, 200, 0.1)
    assert named == []
    steps(200, 300, 0.3)
    assert [rank for rank, _ in named] == [3]
    steps(300, 400, 0.1)
    steps(400, 500, 0.3)
    assert [rank for rank, _ in named] == [3, 3]
