"""The learning rate is a pure function of the step."""

import itertools
import math

import pytest

from rwkv_train.config import Duration, OptimSettings, ScheduleSettings
from rwkv_train.training.optim import learning_rate


def optim(shape: str, warmup: Duration, hold: Duration) -> OptimSettings:
    schedule = ScheduleSettings(shape, warmup, hold)  # type: ignore[arg-type]
    return OptimSettings(1e-3, 1e-5, (0.9, 0.99), 1e-8, 0.0, 1.0, 1e-4, schedule)


def test_warmup_in_tokens() -> None:
    settings = optim("constant", Duration(tokens=1000), Duration(steps=0))
    rates = [learning_rate(settings, step, None, tokens_per_step=100) for step in range(12)]
    assert rates[:10] == [1e-3 * (0.01 + 0.99 * step / 10) for step in range(10)]
    assert rates[10:] == [1e-3, 1e-3]


@pytest.mark.parametrize("shape", ["exponential", "cosine"])
def test_decay_ends_at_the_final_rate(shape: str) -> None:
    settings = optim(shape, Duration(steps=10), Duration(steps=20))
    rates = [learning_rate(settings, step, 101, 64) for step in range(120)]
    assert rates[10:31] == [pytest.approx(1e-3)] * 21
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[30:101]))
    assert rates[100] == pytest.approx(1e-5)
    assert rates[110] == pytest.approx(1e-5)  # past the end, should one go there
    middle = {"exponential": math.sqrt(1e-3 * 1e-5), "cosine": (1e-3 + 1e-5) / 2}[shape]
    assert rates[65] == pytest.approx(middle)
