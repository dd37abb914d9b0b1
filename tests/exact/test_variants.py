"""Settings that must not change a run: offload, activation checkpointing across ranks; and a resume in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_train.cli import launcher
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows, same_weights, stopped_at, train_ranks

STEPS = ("budget.steps=8", "checkpoint.every.steps=4", "validation.every.steps=8", "checkpoint.keep=9")
MORE_OVERRIDES = ("optim.schedule.warmup.steps=2", "batch.micro=1")  # several passes a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a single process; the others are added by the tests."""
    folder = tmp_path_factory.mktemp("variants")
    assert train(launcher.load(overrides_for(folder, "single", *STEPS, MORE_OVERRIDES[0]))) == 0
    return folder


def assert_close(run: Path, other: Path, bound: float = 1e-6) -> None:
    assert len(losses(run)) == 8
    assert losses(run) == pytest.approx(losses(other), rel=bound)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed_2_offload", "deepspeed_3_offload"])
def test_offload(folder: Path, strategy: str) -> None:
    """Resumed as well: the state in the host's memory is saved and restored."""
    overrides = (*STEPS, MORE_OVERRIDES[0], f"strategy={strategy}")
    train_ranks(overrides_for(folder, strategy, *overrides), 2)
    run = folder / "runs" / strategy
    assert_close(run, folder / "runs" / "single")
    resumed = stopped_at(run, 4, f"{strategy}_resumed")
    train_ranks(overrides_for(folder, resumed.name, *overrides), 2)
    assert losses(resumed) == losses(run)
    assert same_weights(resumed, run)


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("deepspeed_2", marks=pytest.mark.slow),
        "deepspeed_3",
    ],
)
def test_activation_checkpointing(folder: Path, strategy: str) -> None:
    overrides = (*STEPS, MORE_OVERRIDES[0], f"strategy={strategy}", "activation_checkpointing=true")
    train_ranks(overrides_for(folder, f"recomputed_{strategy}", *overrides), 2)
    assert_close(folder / "runs" / f"recomputed_{strategy}", folder / "runs" / "single")


@pytest.mark.parametrize("strategy", ["single", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_resume_in_bfloat16_is_bit_equal(folder: Path, strategy: str) -> None:
    overrides = (
        *STEPS,
        *MORE_OVERRIDES,
        "trainer.precision=bf16-mixed",
        "strategy=" + strategy.replace("single", "auto"),
    )

    def run(name: str) -> Path:
        if strategy == "single":
            assert train(launcher.load(overrides_for(folder, name, *overrides))) == 0
        else:
            train_ranks(overrides_for(folder, name, *overrides), 2)
        return folder / "runs" / name

    complete = run(f"bfloat16_{strategy}")
    resumed = stopped_at(complete, 4, f"bfloat16_{strategy}_resumed")
    run(resumed.name)
    assert [row["step"] for row in rows(resumed, "events.jsonl") if row["event"] == "resumed"] == [4]
    assert losses(resumed) == losses(complete)
    assert same_weights(resumed, complete)
    assert losses(complete) != losses(folder / "runs" / "single")
