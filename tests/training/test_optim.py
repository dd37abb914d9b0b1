"""The optimiser holds the trainable parameters only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rwkv_train.checkpoint.shards import Reader, StateShard
from rwkv_train.cli import launcher
from rwkv_train.config import GroupRule
from rwkv_train.errors import UserError
from rwkv_train.models import LanguageModel, ModelConfig, build_model, recipe_of
from rwkv_train.models.unused import freeze_unused
from rwkv_train.training.optim import describe_frozen, describe_groups, parameter_groups
from rwkv_train.training.run import train
from tests.exact import variation
from tests.runs import losses, overrides_for, rows

SHAPE = ModelConfig("rwkv4", 2, 8, 16)


def varied(patch: pytest.MonkeyPatch, declared: bool = True, device: str = "cpu") -> LanguageModel:
    variation.install(patch, declared)
    return build_model(SHAPE, device=device)


def test_groups_hold_the_trainable_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = varied(monkeypatch)
    groups = parameter_groups(model, recipe_of(model), 0.1)
    names = {name for group in groups for name, _ in group["params"]}
    assert names == {name for name, _ in model.named_parameters()} - variation.NOT_TRAINED
    assert len(describe_groups(groups)) == 3
    assert describe_frozen(model) == ["not trained: 4 tensors, 152 values (att.time_decay, att.v0, emb.weight)"]
    assert describe_frozen(nn.Linear(2, 2)) == []


def test_rules_for_parameters_that_are_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = varied(monkeypatch)
    with pytest.raises(UserError, match="matches only parameters that are not trained") as caught:
        parameter_groups(model, recipe_of(model), 0.1, (GroupRule(".*time_decay", 2.0, None),))
    assert caught.value.remedy == "remove the rule, or name trainable ones, e.g. .*att.time_first"
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of the model is trainable"):
        parameter_groups(model, recipe_of(model), 0.1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("recomputed", [0, 1])
def test_unused_parameters_are_found(monkeypatch: pytest.MonkeyPatch, device: str, recomputed: int) -> None:
    model = varied(monkeypatch, declared=False, device=device)
    model.activation_checkpointing = recomputed
    parameters = dict(model.named_parameters())
    assert parameters[variation.UNUSED].requires_grad
    assert freeze_unused(model) == [variation.UNUSED]
    assert {name for name, p in parameters.items() if not p.requires_grad} == variation.NOT_TRAINED


def test_nothing_is_unused_in_a_published_architecture() -> None:
    assert freeze_unused(build_model(SHAPE)) == []


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where parameters before it have no gradient."""
    variation.install(monkeypatch)
    fault = ["packages=[tests]", "+callbacks.fault._target_=tests.training.faults.Fault"]
    more = ["+callbacks.fault.steps=[3]", "+callbacks.fault.kind=gradient", "budget.steps=5"]
    assert train(launcher.load(overrides_for(tmp_path, "run", *fault, *more))) == 0
    assert len(losses(tmp_path / "runs" / "run")) == 5
    (found,) = [row for row in rows(tmp_path / "runs" / "run", "events.jsonl") if row["event"] == "bad_step"]
    assert (found["step"], found["layer"], found["tensor"]) == (3, 1, "gradient of blocks.1.ffn.key.weight")


def test_a_parameter_that_was_frozen_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        variation.install(patch)
        assert train(launcher.load(overrides_for(tmp_path, "run", "budget.steps=2"))) == 0
    (checkpoint,) = (tmp_path / "runs" / "run" / "checkpoints").glob("step_*")
    wanted = StateShard("exp_avg", "emb.weight", 0, torch.empty(256 * 32), True)
    with pytest.raises(UserError, match=r"has no optimiser state of emb\.weight: it was not trained when"):
        Reader(checkpoint).fill([wanted])
