"""Unused and frozen parameters under every strategy: kept to the bit, saved, resumed, moved between strategies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rwkv_train.cli import launcher
from rwkv_train.models import ModelConfig, build_model
from rwkv_train.training.run import train
from tests.exact import variation
from tests.runs import losses, overrides_for, rows, same_weights, stopped_at, train_ranks

STEPS = ("budget.steps=12", "checkpoint.every.steps=6", "validation.every.steps=12", "checkpoint.keep=9")
MORE_OVERRIDES = ("statistics.every.steps=4", "optim.weight_decay=0.1", "optim.schedule.warmup.steps=2")
STRATEGIES = ("ddp", "fsdp", pytest.param("deepspeed_1", marks=pytest.mark.slow), "deepspeed_2", "deepspeed_3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a single process; the others are added by the tests."""
    folder = tmp_path_factory.mktemp("untrained")
    with pytest.MonkeyPatch.context() as patch:
        variation.install(patch)
        assert train(launcher.load(overrides_for(folder, "single", *STEPS, *MORE_OVERRIDES))) == 0
    return folder


def initial_values(run: Path) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        variation.install(patch)
        seed = json.loads(next((run / "checkpoints").glob("*/meta.json")).read_text())["config"]["seed"]
        return build_model(ModelConfig("rwkv4", 2, 32, 256), seed).state_dict()


def assert_untrained_are_kept(run: Path) -> None:
    """Bit-unchanged in the final weights, and without Adam's moments in every checkpoint."""
    weights, initial = torch.load(run / "weights.pth", weights_only=True), initial_values(run)
    assert weights.keys() == initial.keys()
    assert {name for name in weights if torch.equal(weights[name], initial[name])} == variation.NOT_TRAINED
    files = list((run / "checkpoints").glob("*/state*.pth"))
    assert files
    for checkpoint in {file.parent for file in files}:
        held = [torch.load(file, weights_only=True) for file in checkpoint.glob("state*.pth")]
        for moment in ("exp_avg", "exp_avg_sq"):
            names = {name for state in held for name in state[moment]}
            assert names == weights.keys() - variation.NOT_TRAINED
        saved = [torch.load(file, weights_only=True) for file in checkpoint.glob("weights*.pth")]
        assert {name for part in saved for name in part} == weights.keys()


def assert_close(run: Path, other: Path) -> None:
    assert losses(run) == pytest.approx(losses(other), rel=1e-5)
    for one, two in zip(rows(run), rows(other), strict=True):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        for key in ("layers/grad_norm", "layers/update_ratio", "update_ratio"):
            assert (key in two) == (two["step"] % 4 == 0)
            if key in one:  # ZeRO does not know the norm of each gradient
                assert one[key] == pytest.approx(two[key], rel=2e-3)


def test_single(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_untrained_are_kept(folder / "runs" / "single")
    assert losses(folder / "runs" / "single")[-1] < 4.5
    with pytest.MonkeyPatch.context() as patch:
        variation.install(patch)
        assert train(launcher.load(overrides_for(folder, "again", *STEPS, *MORE_OVERRIDES))) == 0
    printed = capsys.readouterr().out
    assert "group   not trained: 4 tensors, 8,288 values (att.time_decay, att.v0, emb.weight)" in printed


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy(folder: Path, strategy: str) -> None:
    """The resumed run has not declared its unused parameter, which makes no difference."""
    overrides = (*STEPS, *MORE_OVERRIDES, f"strategy={strategy}")
    train_ranks(overrides_for(folder, strategy, *overrides), 2, prepare=variation.install)
    run = folder / "runs" / strategy
    assert_close(run, folder / "runs" / "single")
    assert_untrained_are_kept(run)
    resumed = stopped_at(run, 6, f"{strategy}_resumed")
    train_ranks(overrides_for(folder, resumed.name, *overrides), 2, prepare=variation.install_undeclared)
    assert [row["step"] for row in rows(resumed, "events.jsonl") if row["event"] == "resumed"] == [6]
    assert losses(resumed) == losses(run)
    assert same_weights(resumed, run)
    assert_untrained_are_kept(resumed)


@pytest.mark.parametrize(("before", "after"), [("deepspeed_3", "single"), ("single", "deepspeed_2")])
def test_a_checkpoint_moves_to_another_strategy(folder: Path, before: str, after: str) -> None:
    run = folder / "runs" / before
    if not run.exists():
        overrides = overrides_for(folder, before, *STEPS, *MORE_OVERRIDES, f"strategy={before}")
        train_ranks(overrides, 2, prepare=variation.install)
    moved = stopped_at(run, 6, f"{before}_{after}")
    overrides = overrides_for(
        folder, moved.name, *STEPS, *MORE_OVERRIDES, "strategy=" + after.replace("single", "auto")
    )
    if after == "single":
        with pytest.MonkeyPatch.context() as patch:
            variation.install(patch)
            assert train(launcher.load(overrides)) == 0
    else:
        train_ranks(overrides, 2, prepare=variation.install)
    assert_close(moved, folder / "runs" / "single")
    assert_untrained_are_kept(moved)
