"""Large models in miniature, and what they need of this machine's memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import losses, overrides_for, train_ranks

TWO_STEPS = ("budget.steps=2", "optim.schedule.warmup.steps=1", "checkpoint.every.steps=50")


def large(folder: Path, *overrides: str) -> list[str]:
    """The overrides of a run whose shape is that of a published size but for what is typed."""
    return [
        override for override in overrides_for(folder, "run", *TWO_STEPS) if not override.startswith("model.")
    ] + list(overrides)


@pytest.mark.parametrize("size", ["7b", "14b"])
def test_a_published_size_in_miniature(tmp_path: Path, size: str) -> None:
    overrides = large(tmp_path, f"model={size}", "model.n_layer=2", "model.n_embd=256", "strategy=deepspeed_3")
    train_ranks(overrides, 2)
    run = tmp_path / "runs" / "run"
    assert len(losses(run)) == 2
    assert (run / "weights.pth").exists()


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_a_block_of_7b_in_full_width(tmp_path: Path) -> None:
    train_ranks(large(tmp_path, "model=7b", "model.n_layer=1", "strategy=deepspeed_3", "batch.micro=1"), 2, seconds=900)
    assert len(losses(tmp_path / "runs" / "run")) == 2


@pytest.mark.long
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_3"])
def test_the_first_weights_need_the_shard_and_a_few_times_the_largest_parameter(tmp_path: Path, strategy: str) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    spy = f"+callbacks.spy={{_target_: tests.training.spies.Start, folder: {seen}}}"
    shape = ("model=7b", "model.n_layer=4", "model.n_embd=768", "model.vocab_size=65536")
    train_ranks(large(tmp_path, *shape, f"strategy={strategy}", "packages=[tests]", spy), 2, seconds=900)
    for file in seen.glob("*.json"):
        found = json.loads(file.read_text())
        assert found["peak"] <= 1.3 * found["shard"] + 3.5 * 4 * 65536 * 768
