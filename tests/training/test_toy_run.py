"""The toy architecture through a complete run under two strategies, and through every command that reads the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_train.cli import main as cli
from rwkv_train.evaluation.report.page import payload
from rwkv_train.evaluation.report.recorded_run import open_runs
from rwkv_train.exit_codes import ExitCode
from rwkv_train.models import ARCHITECTURES, build_model
from rwkv_train.models.detect import detect_file
from tests.runs import losses, overrides_for, rows, same_weights, stopped_at, train_ranks
from tests.toy_arch import REGISTRATION, register_strictly

SETTINGS = (
    "arch=toy",
    "model=mini",
    "budget.steps=20",
    "checkpoint.every.steps=10",
    "validation.every.steps=10",
    "statistics.every.steps=5",
    "optim.schedule.warmup.steps=2",
)
UNUSED = "blocks.0.att.first"
STRATEGIES = ("ddp", "deepspeed_2")

Runs = Callable[[str], Path]  # strategy → directory of its run of 20 steps on two ranks


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "toy", REGISTRATION)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy's conf files."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "conf" / "arch").mkdir(parents=True)
    (folder / "conf" / "model").mkdir()
    (folder / "conf" / "arch" / "toy.yaml").write_text(
        "# @package _global_\narch: toy\noptim: {betas: [0.9, 0.95], weight_decay: 0.1}\n"
    )
    (folder / "conf" / "model" / "mini.yaml").write_text(
        "size: mini\npublished:\n  toy: {n_layer: 3, n_embd: 32, head_size: 4}\n"
    )
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Runs:
    @cache
    def trained(strategy: str) -> Path:
        train_ranks(overrides(folder, strategy, strategy), 2, prepare=register_strictly)
        return folder / "runs" / strategy

    return trained


def overrides(folder: Path, name: str, strategy: str) -> list[str]:
    typed = overrides_for(folder, name, *SETTINGS, f"strategy={strategy}")
    kept = [override for override in typed if not override.startswith(("model.n_layer=", "model.n_embd="))]
    return ["--config-dir", str(folder / "conf"), *kept]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(run / "weights.pth", weights_only=True)
    return weights


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def generated(source: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What `generate` continues a text with, from weights or a checkpoint."""
    capsys.readouterr()
    assert cli.main(["generate", str(source), "--prompt", "ka", "--tokens", "8", "--seed", "3", "--json"]) == 0
    texts: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["texts"]
    return texts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_learns_and_only_its_unused_parameter_stays(trained: Runs, strategy: str) -> None:
    run = trained(strategy)
    found, weights = losses(run), weights_of(run)
    assert len(found) == 20
    assert sum(found[-3:]) / 3 < found[0] - 1
    assert rows(run)[-1]["val/loss"] < rows(run)[9]["val/loss"]
    shape = detect_file(run)
    assert shape is not None
    assert (shape.arch, shape.n_layer, shape.n_embd, shape.head_size) == ("toy", 3, 32, 4)
    initial = build_model(shape, seed=1).state_dict()
    assert weights.keys() == initial.keys()
    assert [name for name in weights if torch.equal(weights[name], initial[name])] == [UNUSED]


def test_both_strategies_make_the_same_steps(trained: Runs) -> None:
    one, two = trained("ddp"), trained("deepspeed_2")
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    for first, second in zip(rows(one), rows(two), strict=True):
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
    first, second = weights_of(one), weights_of(two)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_makes_the_same_steps(folder: Path, trained: Runs, strategy: str) -> None:
    resumed = stopped_at(trained(strategy), 10, f"{strategy}_resumed")
    train_ranks(overrides(folder, resumed.name, strategy), 2, prepare=register_strictly)
    assert [row["step"] for row in rows(resumed, "events.jsonl") if row["event"] == "resumed"] == [10]
    assert losses(resumed) == losses(trained(strategy))
    assert same_weights(resumed, trained(strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_its_statistics_are_logged_and_reported(trained: Runs, strategy: str) -> None:
    run = trained(strategy)
    measured = [row for row in rows(run) if "layers/update_ratio" in row]
    assert [row["step"] for row in measured] == [5, 10, 15, 20]
    for row in measured:
        for key in ("layers/state_rms", "layers/active", "layers/contribution", "layers/update_ratio"):
            assert len(row[key]) == 3
            assert all(value > 0 for value in row[key])
        assert [len(quantiles) for quantiles in row["decay/half_life"]] == [5, 5, 5]
        assert ("layers/grad_norm" in row) == (strategy == "ddp")
        assert "layers/receptance_saturated" not in row
    assert cli.main(["report", str(run)]) == 0
    data = payload(open_runs([run]))
    titles = {chart["key"]: chart["title"] for chart in data["layers"]}
    assert titles["layers/active"] == "Active channels"
    assert titles["layers/state_rms"] == "RMS of the state"
    assert "layers/receptance_saturated" not in titles
    shown = data["runs"][0]["layers"]
    assert shown["layers/active"]["x"] == [5, 10, 15, 20]
    assert shown["decay/half_life"]["x"] == [5, 10, 15, 20]
    assert '"Active channels"' in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_3"])
def test_sharded_parameters_make_the_same_steps(
    trained: Runs, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(strategy)
    assert losses(run) == pytest.approx(losses(trained("ddp")), rel=1e-5)
    checkpoint = last_checkpoint(run)
    assert len(list(checkpoint.glob("weights*.pth"))) == 2
    assert generated(checkpoint, capsys) == generated(run / "weights.pth", capsys)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plan(folder: Path, strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    typed = [*overrides(folder, "planned", strategy), "trainer.devices=2"]
    assert cli.main(["plan", *typed]) == 0
    assert "model   toy mini: L3 C32 V256, 50,976 parameters, 251,904 FLOPs" in capsys.readouterr().out
    assert cli.main(["plan", *typed, "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (plan["strategy"], plan["devices"], plan["fits"]) == (strategy, 2, True)
    assert plan["memory"]["statistics"] == 2 * 3 * 3 * 32 * 4  # states (3, C) of 3 layers, for a micro-batch of 2
    assert not (folder / "runs" / "planned").exists()


def test_a_head_size_that_does_not_divide_the_channels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = "error: arch=toy: n_embd is 32; it must be a multiple of head_size, 5\n  change that setting of model\n"
    for command in ("plan", "train"):
        assert cli.main([command, *overrides(folder, "refused", "auto"), "model.head_size=5"]) == 2
        assert capsys.readouterr().err == refused
    assert not (folder / "runs" / "refused").exists()


def test_an_optimiser_rule_that_matches_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["train", *overrides(folder, "refused", "auto"), "optim.rules=[{pattern: .*time_decay, lr: 2.0}]"])
        == 2
    )
    assert capsys.readouterr().err == (
        "error: optim.rules: the pattern '.*time_decay' matches no parameter\n  e.g. .*att.decay\n"
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generate(trained: Runs, strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = generated(trained(strategy) / "weights.pth", capsys)
    assert len(texts[0]["tokens"]) == 8
    assert generated(last_checkpoint(trained(strategy)), capsys) == texts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_status(trained: Runs, strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(trained(strategy))]) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown
    assert "20 of 20" in shown


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_export(trained: Runs, strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = last_checkpoint(trained(strategy))
    assert cli.main(["export", str(checkpoint), str(tmp_path / "toy.pth")]) == 0
    exported = torch.load(tmp_path / "toy.pth", weights_only=True)
    final = weights_of(trained(strategy))
    assert exported.keys() == final.keys()
    assert all(torch.equal(exported[name], final[name]) for name in final)
    assert cli.main(["export", str(checkpoint), str(tmp_path / "toy")]) == 2
    assert "transformers has no model of arch=toy" in capsys.readouterr().err


def test_a_state_that_is_not_finite_is_named_and_replayed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warning = f"1 parameters get no gradient and are not trained: {UNUSED}"
    typed = [*overrides(folder, "bad", "auto"), "health.nonfinite=stop", "optim.lr=1e9", "optim.clip=null"]
    with pytest.warns(UserWarning, match=warning):
        assert cli.main(["train", *typed]) == ExitCode.UNHEALTHY
    assert "ALERT step 2: blocks.1: wkv state is not finite" in capsys.readouterr().out
    (file,) = (folder / "runs" / "bad" / "replay").glob("*.json")
    with pytest.warns(UserWarning, match=warning):
        assert cli.main(["train", f"replay={file}"]) == 0
    assert "blocks.1: wkv state" in capsys.readouterr().out
