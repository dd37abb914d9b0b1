"""The interval of checkpoints and the goodput, against a run that is drawn failure by failure."""

from __future__ import annotations

import json
import random

import pytest

from rwkv_train.cli import launcher
from rwkv_train.planning.goodput import FAILURE_RATES, RESTART_SECONDS, Saving, between_failures, goodput, interval


def drawn(every: float, cost: Saving, failures: float, seed: int, spans: int = 20_000) -> float:
    """The goodput of a run whose failures are drawn, each with a mean of `failures` seconds."""
    draw, wall, done = random.Random(seed), 0.0, 0
    left = draw.expovariate(1 / failures)
    while done < spans:
        needed = every + cost.pause
        if left > needed:
            wall, left, done = wall + needed, left - needed, done + 1
            continue
        wall += left + RESTART_SECONDS + cost.write  # the write: of what was under way
        left = draw.expovariate(1 / failures)
    return every * done / wall


@pytest.mark.parametrize(("pause", "write", "hours"), [(1.0, 10.0, 10.0), (0.5, 200.0, 2.0), (20.0, 30.0, 1.0)])
def test_the_formula_is_what_happens(pause: float, write: float, hours: float) -> None:
    cost, failures = Saving(pause, write), hours * 3600
    for every in (300.0, 1200.0):
        assert goodput(every, cost, failures) == pytest.approx(drawn(every, cost, failures, seed=1), abs=0.012)


@pytest.mark.parametrize("nodes", [8, 128, 1024])
@pytest.mark.parametrize("pause", [0.5, 5.0])
def test_no_other_interval_is_much_better(nodes: int, pause: float) -> None:
    cost, failures = Saving(pause, 2 * pause), between_failures(nodes)
    proposed = interval(cost, failures)
    best = max(goodput(proposed * factor / 20, cost, failures) for factor in range(2, 100))
    assert goodput(proposed, cost, failures) >= best - 1e-4
    assert goodput(2 * proposed, cost, failures) < goodput(proposed, cost, failures)
    assert goodput(proposed / 2, cost, failures) < goodput(proposed, cost, failures)


def test_a_save_is_not_begun_before_the_last_one_ends() -> None:
    assert interval(Saving(0.1, 900.0), 3600.0) == 900.0


def test_published_rates() -> None:
    """In failures of 1,000 nodes a day; RSC-1's gives the paper's 1.8 hours for 16,384 GPUs."""
    assert {name: round(1000 * rate, 1) for name, rate in FAILURE_RATES.items()} == {
        "RSC-1": 6.5,
        "RSC-2": 2.3,
        "Llama 3": 3.8,
        "OPT-175B": 14.1,
    }
    assert between_failures(2048, FAILURE_RATES["RSC-1"]) / 3600 == pytest.approx(1.8, abs=0.01)
    # "one every three hours"
    assert between_failures(2048, FAILURE_RATES["Llama 3"]) / 3600 == pytest.approx(3.1, abs=0.05)


def test_the_plan_proposes_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "arch=rwkv4",
        "model=7b",
        "trainer.devices=8",
        "trainer.num_nodes=32",
        "batch.context=4096",
        "batch.micro=2",
    ]
    overrides += ["batch.tokens=4194304", "trainer.precision=bf16-mixed", "device=h100-80g"]
    assert launcher.plan(overrides) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failures")]
    assert launcher.plan([*overrides, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nodes"] == 32
    assert found["hours_between_failures"] == pytest.approx(115.4, abs=0.1)
    steps, share = found["checkpoint_every_steps"], found["goodput"]
    assert found["checkpoint_every_minutes"] == pytest.approx(steps * found["step_seconds"] / 60)
    assert line == (
        f"failures    one in 115 h on 32 nodes (as on RSC-1): checkpoint.every.steps={steps:,} "
        f"({found['checkpoint_every_minutes']:.0f} min) leaves {share:.1%} of the time for training"
    )
    assert 0.99 < share < 1
