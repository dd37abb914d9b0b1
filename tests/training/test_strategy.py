"""What every strategy must leave as it is: the dtype of the vectors, the groups of the recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rwkv_train import launcher
from rwkv_train.planning.plan import HEADROOM, make_plan
from rwkv_train.training import parts
from rwkv_train.training.run import train
from tests.runs import losses, train_ranks, words_for

SPY = ("packages=[tests]", "budget.steps=2", "optim.schedule.warmup.steps=1", "checkpoint.every.steps=50")


def look(folder: Path, spy: str, *words: str) -> Any:
    """What a spy of tests/training/spies.py has written in a run of two ranks."""
    seen = folder / "seen.json"
    spied = f"+callbacks.spy={{_target_: tests.training.spies.{spy}, path: {seen}}}"
    train_ranks(words_for(folder, "run", *SPY, spied, *words), 2)
    return json.loads(seen.read_text())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_2", "deepspeed_3"])
def test_vectors_are_float32_in_the_forward_pass(tmp_path: Path, strategy: str) -> None:
    words = (f"strategy={strategy}", "trainer.precision=bf16-mixed", "optim.weight_decay=0.1")
    seen = look(tmp_path, "Look", *words)
    vectors = {name: dtype for name, dtype in seen["dtypes"].items() if "time_" in name or "ln" in name}
    assert len(vectors) == 2 * 7 + 2 * 4 + 2 + 2
    assert set(vectors.values()) == {"torch.float32"}
    lr = seen["groups"][0][2]
    assert [group[:3] for group in seen["groups"]] == [
        [1.0, 0.0, lr],
        [1.0, 0.1, lr],
        [2.0, 0.0, 2 * lr],
        [3.0, 0.0, 3 * lr],
    ]


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_2", "deepspeed_3"])
def test_an_update_of_a_hundred_thousandth_changes_the_output(tmp_path: Path, strategy: str) -> None:
    before, after = look(tmp_path, "Nudge", f"strategy={strategy}", "trainer.precision=bf16-mixed")
    assert before != after


def test_a_step_that_is_too_large_is_cut_into_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("budget.steps=6", "validation.every.steps=6")
    assert train(launcher.load(words_for(tmp_path, "whole", *words))) == 0
    capsys.readouterr()
    config = launcher.load(words_for(tmp_path, "cut", *words))
    card = parts.cpu_card(1)
    two = make_plan(replace(config, batch=replace(config.batch, micro=2)), card, 1, 256, gpu=False).held
    monkeypatch.setattr(parts, "_SMALL", 0.0)
    monkeypatch.setattr(parts, "cpu_card", lambda processes: replace(card, memory=two / HEADROOM * 1.0001))
    assert train(config) == 0
    told = capsys.readouterr().out
    assert "strategy=auto: single: a whole copy fits in 2 passes a step" in told
    assert "micro-batch 2 × 1 devices × 2 passes" in told
    assert losses(tmp_path / "runs" / "cut") == pytest.approx(losses(tmp_path / "runs" / "whole"), rel=1e-5)
