"""Steps and tokens, also where a resume has changed the batch."""

from __future__ import annotations

import pytest

from rwkv_train.config import Duration
from rwkv_train.config.clock import TokenClock

CHANGED_TWICE = TokenClock(((0, 100), (4, 200), (6, 50)))
COUNTED = [0, 100, 200, 300, 400, 600, 800, 850, 900, 950]


def test_tokens_are_counted_step_by_step() -> None:
    assert [CHANGED_TWICE.tokens(step) for step in range(10)] == COUNTED
    assert (CHANGED_TWICE.first_batch, CHANGED_TWICE.batch, CHANGED_TWICE.changed) == (100, 50, 6)


def test_a_length_in_tokens_ends_with_the_step_that_reaches_it() -> None:
    for tokens in range(1, 951):
        step = CHANGED_TWICE.steps(Duration(tokens=tokens))
        assert COUNTED[step - 1] < tokens <= COUNTED[step], tokens
    assert CHANGED_TWICE.steps(Duration(steps=7)) == 7
    assert TokenClock(((0, 100),)).steps(Duration(tokens=101)) == 2


@pytest.mark.parametrize(
    ("batches", "step", "batch", "expected"),
    [
        ((), 0, 64, ((0, 64),)),
        (((0, 64),), 0, 32, ((0, 32),)),
        (((0, 64),), 5, 64, ((0, 64),)),
        (((0, 64),), 5, 32, ((0, 64), (5, 32))),
        (((0, 64), (5, 32)), 5, 64, ((0, 64),)),
        (((0, 64), (5, 32)), 7, 64, ((0, 64), (5, 32), (7, 64))),
        (((0, 64), (5, 32)), 3, 32, ((0, 64), (3, 32))),
    ],
)
def test_a_resume_keeps_what_is_done(
    batches: tuple[tuple[int, int], ...], step: int, batch: int, expected: tuple[tuple[int, int], ...]
) -> None:
    assert TokenClock.resumed(batches, step, batch).batches == expected
