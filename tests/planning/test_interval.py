"""Young's and Daly's formulas against failures drawn by chance, and against what was published."""

from __future__ import annotations

import json
import math
import random

import pytest

from rwkv_train import launcher
from rwkv_train.planning.interval import RATES, Cost, between_failures, goodput, interval


def simulated(every: float, cost: Cost, mtbf: float, failures: int = 20000) -> float:
    """The same by trying: failures come by chance, also while the run starts again."""
    draw = random.Random(1)
    clock = useful = 0.0
    for _ in range(failures):
        up = draw.expovariate(1 / mtbf)
        clock += up
        working = up - cost.restart - cost.writing
        useful += max(0.0, working // (every + cost.pause)) * every
    return useful / clock


@pytest.mark.parametrize(
    ("pause", "restart", "mtbf"), [(5, 300, 30000), (60, 600, 10000), (1, 30, 86400), (120, 0, 3000)]
)
def test_goodput_is_that_of_random_failures(pause: float, restart: float, mtbf: float) -> None:
    cost = Cost(pause, 0.0, restart)
    every = interval(cost, mtbf)
    assert goodput(every, cost, mtbf) == pytest.approx(simulated(every, cost, mtbf), abs=0.01)
    assert goodput(every, Cost(pause, 20.0, restart), mtbf) < goodput(every, cost, mtbf)


@pytest.mark.parametrize(("pause", "mtbf"), [(1.0, 86400.0), (5.0, 30000.0), (60.0, 10000.0), (300.0, 3000.0)])
def test_the_interval_is_the_best_one(pause: float, mtbf: float) -> None:
    best = interval(Cost(pause), mtbf)
    found = max(range(1, 40000), key=lambda every: goodput(float(every), Cost(pause), mtbf))
    assert best == pytest.approx(found, rel=0.02, abs=1.0)
    assert interval(Cost(0.01), mtbf) == pytest.approx(math.sqrt(2 * 0.01 * mtbf), rel=0.01)  # Young's
    assert interval(Cost(3 * mtbf), mtbf) == mtbf
    assert interval(Cost(pause, 2 * best), mtbf) == 2 * best  # one after the other


def test_published_failures() -> None:
    """Their own words for them: an interruption each 3 hours; 1.8 hours expected for 16,384 GPUs."""
    assert between_failures(2048, RATES["Llama 3"]) / 3600 == pytest.approx(3.1, abs=0.05)
    assert between_failures(2048, RATES["RSC-1"]) / 3600 == pytest.approx(1.8, abs=0.05)


def test_the_plan_proposes_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=7b", "trainer.devices=8", "trainer.num_nodes=128", "batch.tokens=8388608", "batch.context=4096"]
    words += ["device=h100-80g", "strategy=deepspeed_3", "batch.micro=2", "activation_checkpointing=true"]
    assert launcher.plan([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.95 < told["goodput"] < 1
    seconds = told["checkpoint_every_steps"] * told["step_seconds"]
    assert 5 < seconds < 3600
    assert launcher.plan(words) == 0
    said = capsys.readouterr().out
    assert f"best every {told['checkpoint_every_steps']:,} steps (" in said
    assert f"goodput {told['goodput']:.1%}" in said
