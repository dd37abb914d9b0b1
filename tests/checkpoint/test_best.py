"""checkpoint.best=true: the loss in a checkpoint is that of its own weights, and the lowest finite one is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rwkv_train.checkpoint.directory import list_checkpoints, read_meta
from rwkv_train.checkpoint.retention import checkpoints_to_keep
from rwkv_train.cli import launcher
from rwkv_train.training.run import train
from rwkv_train.training.validation_sums import ValidationResult, ValidationSums
from tests.runs import overrides_for, rows


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_only_a_finite_loss_is_the_best(bad: float | None) -> None:
    assert checkpoints_to_keep({1: bad, 2: 2.0, 3: 3.0, 4: 4.0}, 1, True) == {2, 4}
    assert checkpoints_to_keep({1: bad, 2: bad, 3: bad}, 1, True) == {3}
    assert checkpoints_to_keep({1: 1.0, 2: 2.0, 3: bad}, 1, False) == {3}


def test_a_loss_belongs_to_its_own_step() -> None:
    assert ValidationResult(3, 2.0, 3.0, {}).loss_of(3) == 2.0
    assert ValidationResult(3, 2.0, 3.0, {}).loss_of(4) is None
    assert ValidationResult(3, math.nan, math.nan, {}).loss_of(3) is None


def test_a_validated_step_has_a_checkpoint_with_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations at 3, 6 and 9, of which the first is the best and the second not finite; checkpoints at 4 and 8."""
    plain, given = ValidationSums.result, {3: 2.5, 6: math.nan, 9: 3.5}

    def result(self: ValidationSums, reduce: Any, step: int) -> ValidationResult:
        return replace(plain(self, reduce, step), loss=given[step])

    monkeypatch.setattr(ValidationSums, "result", result)
    steps = ["budget.steps=9", "checkpoint.every.steps=4", "validation.every.steps=3", "checkpoint.keep=3"]
    assert train(launcher.load(overrides_for(tmp_path, "run", *steps, "checkpoint.best=true"))) == 0
    run = tmp_path / "runs" / "run"
    assert [row["step"] for row in rows(run, "events.jsonl") if row["event"] == "checkpoint"] == [3, 4, 6, 8, 9]
    metas = [read_meta(path) for path in list_checkpoints(run / "checkpoints")]
    assert {meta.step: meta.val_loss for meta in metas} == {3: 2.5, 6: None, 8: None, 9: 3.5}
    assert [row["val/loss"] for row in rows(run) if "val/loss" in row] == [2.5, None, 3.5]
