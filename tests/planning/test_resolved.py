"""What a run uses: every open setting settled once, the config itself left as the user typed it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rwkv_train import resources
from rwkv_train.cli import launcher
from rwkv_train.config.mesh import Mesh
from rwkv_train.errors import UserError
from rwkv_train.planning import resolved
from rwkv_train.planning.resolved import Devices, ResolvedConfig
from rwkv_train.training.run import train
from rwkv_train.training.setup import assemble
from rwkv_train.training.strategy import build_strategy
from tests.runs import overrides_for, rows


def values(found: Any) -> dict[str, Any]:
    return {field.name: getattr(found, field.name) for field in fields(found)}


def test_nothing_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cpu_cores", lambda: 8)
    more = ("trainer.accelerator=auto", "trainer.devices=auto", "batch.micro=2")
    setup = assemble(
        launcher.load([override for override in overrides_for(tmp_path, "run", *more) if override != "threads=1"])
    )
    found = setup.resolved
    assert (found.mesh, found.strategy, found.micro, found.accumulation) == (Mesh(1), "single", 2, 2)
    assert (found.accelerator, found.precision, found.threads) == ("cpu", "32-true", 8)
    assert not [name for name, value in values(found).items() if value in ("auto", None)]
    assert (setup.config.trainer.precision, setup.config.strategy, setup.config.trainer.devices) == ("auto",) * 3
    assert (setup.tree["trainer"]["precision"], setup.tree["strategy"]) == ("32-true", "auto")
    plan = found.plan(setup.config, setup.data.vocabulary)
    assert (plan.layout.strategy, plan.layout.micro, plan.layout.accumulation) == ("single", 2, 2)


def test_the_precision_is_recorded(tmp_path: Path) -> None:
    """config.yaml has the one that ran, so that a resume keeps it; devices and strategy stay open."""
    assert train(launcher.load(overrides_for(tmp_path, "run", "budget.steps=2"))) == 0
    run = tmp_path / "runs" / "run"
    tree = yaml.safe_load((run / "config.yaml").read_text())
    assert (tree["trainer"]["precision"], tree["strategy"], tree["batch"]["micro"]) == ("32-true", "auto", None)
    assert len(rows(run)) == 2


def test_several_ranks_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cpu_cores", lambda: 4)
    config = launcher.load([override for override in overrides_for(tmp_path, "run") if override != "threads=1"])
    found = resolved.find_devices(replace(config, trainer=replace(config.trainer, devices=2)))
    assert (found.mesh, found.per_node, found.nodes, found.threads) == (Mesh(2), 2, 1, 2)


def test_a_chosen_strategy_whose_package_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = launcher.load(overrides_for(tmp_path, "run", "strategy=auto"))
    monkeypatch.setattr(resolved, "find_spec", lambda name: None)
    monkeypatch.setattr(resolved, "_choose", lambda *arguments: ("deepspeed_2", 4))
    with pytest.raises(UserError, match="strategy=deepspeed_2 needs deepspeed, which is not installed"):
        resolved.resolve(config, resolved.find_devices(config), 256, 4, Console())


def test_no_strategy_splits_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = launcher.load(overrides_for(tmp_path, "run"))
    monkeypatch.setattr(Devices, "mesh", property(lambda self: Mesh(1, context=2)))
    found = ResolvedConfig(**vars(resolved.find_devices(config)), strategy="ddp", micro=4, accumulation=1)
    with pytest.raises(ValueError, match="strategy=ddp cannot split samples over 2 context ranks"):
        build_strategy(config, found, block=1)
