"""What no strategy may change: the dtype of the vectors, the groups of the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_train.cli import launcher
from rwkv_train.config.mesh import Mesh
from rwkv_train.models import ModelConfig, build_model, recipe_of
from rwkv_train.planning import resolved
from rwkv_train.planning.cards import cpu_card
from rwkv_train.planning.plan import MAX_MEMORY_SHARE, make_plan
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, train_ranks

SPY_OVERRIDES = ("packages=[tests]", "budget.steps=2", "optim.schedule.warmup.steps=1", "checkpoint.every.steps=50")


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the spies Look and Nudge have written in a run of two ranks under a strategy, which is trained once."""

    @cache
    def look(strategy: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(strategy)
        spies = [
            f"+callbacks.{spy}={{_target_: tests.training.spies.{spy}, path: {folder / spy}}}"
            for spy in ("Look", "Nudge")
        ]
        overrides = (f"strategy={strategy}", "trainer.precision=bf16-mixed", "optim.weight_decay=0.1", "threads=2")
        train_ranks(overrides_for(folder, "run", *SPY_OVERRIDES, *spies, *overrides), 2)
        return {**json.loads((folder / "Look").read_text()), "probes": json.loads((folder / "Nudge").read_text())}

    return look


def test_the_threads_are_the_run_s_own(look: Callable[[str], dict[str, Any]]) -> None:
    """Lightning sets a number of its own where OMP_NUM_THREADS is not set; sums over threads would differ by it."""
    assert look("ddp")["threads"] == 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_2", "deepspeed_3"])
def test_vectors_are_float32_in_the_forward_pass(look: Callable[[str], dict[str, Any]], strategy: str) -> None:
    seen = look(strategy)
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


@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp", "deepspeed_1", "deepspeed_1_offload", "deepspeed_2", "deepspeed_3"]
)
def test_every_parameter_steps_by_its_own_row(tmp_path: Path, strategy: str) -> None:
    """Adam's first step is ± the learning rate wherever there is a gradient: read off are multiplier and decay."""
    shape = ModelConfig("rwkv4", 2, 32, 256)
    model, generator = build_model(shape), torch.Generator().manual_seed(6)
    weights = {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in model.state_dict().items()}
    torch.save(weights, tmp_path / "lively.pth")
    (tmp_path / "seen").mkdir()
    train_ranks(
        [
            *(
                override
                for override in overrides_for(tmp_path, "run", *SPY_OVERRIDES, f"strategy={strategy}")
                if "model.n" not in override
            ),
            f"init.weights={tmp_path / 'lively.pth'}",
            f"+callbacks.spy={{_target_: tests.training.spies.Step, folder: {tmp_path / 'seen'}}}",
            "optim.weight_decay=0.1",
            "optim.eps=1e-20",
            "optim.lr=0.1",
            "optim.rules=[{pattern: .*ffn.key.weight, lr: 0.5}]",
        ],
        2,
    )
    seen, stepped = dict.fromkeys(weights, 0), set[str]()
    for file in (tmp_path / "seen").glob("*.pth"):
        held = torch.load(file)
        for name, start, before, after in held["found"]:
            row, matched = recipe_of(model)[name], name.endswith("ffn.key.weight")
            lr, decay = held["lr"] * (0.5 if matched else row.lr), 0.1 if row.decay else 0.0
            before, after = before.flatten().double(), after.flatten().double()
            assert torch.equal(before.float(), weights[name].flatten()[start : start + before.numel()]), name
            steps = (after - before * (1 - lr * decay)).abs() / lr
            moved = steps > 0.5
            assert ((steps[moved] - 1).abs() < 2e-3).all(), name
            assert (steps[~moved] < 2e-3).all(), name
            stepped |= {name} if moved.any() else set()
            seen[name] += before.numel()
    assert stepped == weights.keys()
    assert seen == {name: value.numel() for name, value in weights.items()}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3"])
def test_a_resume_needs_no_more_memory_than_a_fresh_start(tmp_path: Path, strategy: str) -> None:
    """Both up to the third step, in new processes; 0.6 GB of state."""
    peaks = []
    for name, steps in (("fresh", 3), ("resumed", 6)):
        seen = tmp_path / name
        seen.mkdir()
        spy = f"+callbacks.spy={{_target_: tests.training.spies.Peak, folder: {seen}}}"
        shape = ("model.n_layer=6", "model.n_embd=512", "model.vocab_size=16384")
        overrides = (
            "packages=[tests]",
            spy,
            f"budget.steps={steps}",
            "optim.schedule.warmup.steps=1",
            f"strategy={strategy}",
        )
        train_ranks(overrides_for(tmp_path, "run", *shape, *overrides, "run.allow_changes=true"), 2)
        peaks.append([json.loads((seen / f"{rank}.json").read_text()) for rank in range(2)])
    for fresh, resumed in zip(*peaks, strict=True):
        assert fresh > 200e6
        assert resumed <= 1.02 * fresh, peaks


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_2", "deepspeed_3"])
def test_an_update_of_a_hundred_thousandth_changes_the_output(
    look: Callable[[str], dict[str, Any]], strategy: str
) -> None:
    before, after = look(strategy)["probes"]
    assert before != after


def test_a_step_that_is_too_large_is_cut_into_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("budget.steps=6", "validation.every.steps=6")
    assert train(launcher.load(overrides_for(tmp_path, "whole", *overrides))) == 0
    capsys.readouterr()
    config = launcher.load(overrides_for(tmp_path, "cut", *overrides))
    card = cpu_card(1)
    two = make_plan(replace(config, batch=replace(config.batch, micro=2)), card, Mesh(1), 256, gpu=False).held
    monkeypatch.setattr(resolved, "SMALL_STATE", 0.0)
    monkeypatch.setattr(resolved, "cpu_card", lambda processes: replace(card, memory=two / MAX_MEMORY_SHARE * 1.0001))
    assert train(config) == 0
    printed = capsys.readouterr().out
    assert "strategy=auto: single: a whole copy fits in 2 passes a step" in printed
    assert "micro-batch 2 × 1 devices × 2 passes" in printed
    assert losses(tmp_path / "runs" / "cut") == pytest.approx(losses(tmp_path / "runs" / "whole"), rel=1e-5)
