"""The learning rate is a pure function of the tokens trained on."""

import itertools
import math

import pytest

from rwkv_train.config import Duration, OptimSettings, ScheduleSettings
from rwkv_train.config.clock import TokenClock
from rwkv_train.training.optim import learning_rate


def optim(shape: str, warmup: Duration, hold: Duration) -> OptimSettings:
    schedule = ScheduleSettings(shape, warmup, hold)  # type: ignore[arg-type]
    return OptimSettings(1e-3, 1e-5, (0.9, 0.99), 1e-8, 0.0, 1.0, 1e-4, schedule)


def test_warmup_in_tokens() -> None:
    settings = optim("constant", Duration(tokens=1000), Duration(steps=0))
    rates = [learning_rate(settings, 100 * step, None, tokens_per_step=100) for step in range(12)]
    assert rates[:10] == [1e-3 * (0.01 + 0.99 * step / 10) for step in range(10)]
    assert rates[10:] == [1e-3, 1e-3]


@pytest.mark.parametrize("shape", ["exponential", "cosine"])
def test_decay_ends_at_the_final_rate(shape: str) -> None:
    settings = optim(shape, Duration(steps=10), Duration(steps=20))
    rates = [learning_rate(settings, 64 * step, 64 * 100, 64) for step in range(120)]
    assert rates[10:31] == [pytest.approx(1e-3)] * 21
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[30:101]))
    assert rates[100] == pytest.approx(1e-5)
    assert rates[110] == pytest.approx(1e-5)  # past the end, should one go there
    middle = {"exponential": math.sqrt(1e-3 * 1e-5), "cosine": (1e-3 + 1e-5) / 2}[shape]
    assert rates[65] == pytest.approx(middle)


@pytest.mark.parametrize("shape", ["constant", "exponential", "cosine"])
def test_another_batch_does_not_move_the_schedule_in_tokens(shape: str) -> None:
    """Steps of 96 tokens, later of 192: after as many tokens the same rate. Only the last step is longer."""
    settings, length = optim(shape, Duration(steps=10), Duration(steps=20)), Duration(tokens=96 * 100)
    before = TokenClock(((0, 96),))
    rates = {before.tokens(step): learning_rate(settings, 96 * step, 96 * 99, 96) for step in range(100)}
    for change in (7, 25, 60):
        clock = TokenClock.resumed(before.batches, change, 192)
        total = clock.steps(length)
        last = clock.tokens(total - 1)
        assert (total, clock.first_batch) == (change + math.ceil((100 - change) / 2), 96)
        for step in range(total):
            tokens = clock.tokens(step)
            now, then = learning_rate(settings, tokens, last, 96), rates[tokens]
            exact = shape == "constant" or tokens <= 96 * 30
            nearby = rates[min(tokens + 96, 96 * 99)] if tokens else then
            assert now == then if exact else nearby * (1 - 1e-9) <= now <= then * (1 + 1e-9), step
