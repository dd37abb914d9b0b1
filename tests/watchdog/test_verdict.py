"""Thousands of simulated runs with a fault: each ends in time, by a verdict that names the culprits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rwkv_train.watchdog import verdict
from rwkv_train.watchdog.verdict import Coordinator, Member, RankReport, Stragglers, furthest_behind
from tests.watchdog.simulation import FAULTS, Schedule, schedule


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


def the_latest_is_the_culprit(reports: Any) -> list[RankReport]:
    """The rank that waits longest is late, but not the culprit."""
    reports = list(reports)
    return [max(reports, key=lambda report: report.in_phase)] if reports else []


def the_first_is_the_culprit(reports: Any) -> list[RankReport]:
    return list(reports)[:1]


def a_rank_that_has_reported_is_never_lost(self: Coordinator, report: RankReport, now: float) -> None:
    receive(self, report, float("inf") if report.ended is None else now)


receive = Coordinator.receive
BROKEN_RULES: list[tuple[Any, str, Callable[..., Any]]] = [
    (verdict, "furthest_behind", the_latest_is_the_culprit),
    (verdict, "furthest_behind", the_first_is_the_culprit),
    (Coordinator, "receive", a_rank_that_has_reported_is_never_lost),
    (Coordinator, "discount", lambda self, seconds: None),
    (Member, "discount", lambda self, seconds: None),
    (Member, "judge", lambda self, now: self.verdict),
]


@pytest.mark.parametrize("number", range(len(BROKEN_RULES)))
def test_a_broken_rule_is_seen(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, instead = BROKEN_RULES[number]
    monkeypatch.setattr(where, name, instead)
    assert any(failures(range(1, 301)))


@pytest.mark.parametrize(
    "constants", [{"REPORT_TIMEOUT": 2.0, "REPORT_SPREAD": 0.0}, {"REPORT_SPREAD": 0.0}, {"ANSWER_TIMEOUT": 5.0}]
)
def test_too_little_patience_is_seen(constants: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are lost: two seconds without one mean nothing."""
    for name, value in constants.items():
        monkeypatch.setattr(verdict, name, value)
    assert any(failures(range(1, 301)))


def test_all_faults_are_among_them() -> None:
    assert {schedule(seed).fault for seed in range(1, 301)} == set(FAULTS)


def test_of_several_ranks_at_one_position_further_signs_decide() -> None:
    alike = [RankReport(rank, step=4, phase_number=2, in_phase=9.0, phase=6) for rank in range(4)]
    assert furthest_behind(alike) == alike
    frozen = RankReport(2, step=4, phase_number=2, frozen=30.0)
    assert furthest_behind([*alike[:2], frozen]) == [frozen]
    writing = RankReport(3, step=4, phase_number=2, phase=6, saving=12.0)
    assert furthest_behind([*alike[:3], writing]) == [writing]
    behind = RankReport(7, step=3, phase_number=9)
    assert furthest_behind([*alike, frozen, behind]) == [behind]


def test_a_rank_that_may_take_its_time_is_waited_for() -> None:
    """Rank 1 is in a long checkpoint, rank 0 has waited for it for longer than a step may take."""
    judge = Coordinator(2, verdict.Limits(), 0.0)
    judge.receive(RankReport(0, step=5, phase_number=2, phase=2, in_phase=400.0, limit=60.0), 0.0)
    judge.receive(RankReport(1, step=5, phase_number=1, phase=6, in_phase=400.0, limit=1800.0), 0.0)
    assert judge.judge(1.0) is None
    judge.receive(RankReport(1, "there", step=5, phase_number=1, phase=6, in_phase=1900.0, limit=1800.0), 0.0)
    decision = judge.judge(1.0)
    assert decision is not None
    assert decision.reason == (
        "rank 1 on there hangs: checkpoint of step 6 for 1900 s (limit 1800 s); the other rank waits"
    )


def test_a_straggler_is_named_once_and_again_after_it_has_recovered() -> None:
    slow = Stragglers(1.5, 20)
    named: list[tuple[int, int]] = []

    def steps(first: int, last: int, work: float) -> None:
        for step in range(first, last):
            reports = {
                rank: RankReport(rank, step=step, work=work if rank == 3 else 0.1 + 0.001 * rank) for rank in range(8)
            }
            named.extend((report.rank, step) for report, _ in slow.update(reports))

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
