"""Every strategy computes the same run, and resumes from the checkpoints of every other one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rwkv_train.cli import launcher
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows, same_weights, stopped_at, train_ranks

STRATEGIES = ("ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3")
THIRTY_STEPS = ("budget.steps=30", "checkpoint.every.steps=10", "validation.every.steps=15", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a single process; the others are added by the tests."""
    folder = tmp_path_factory.mktemp("strategies")
    assert train(launcher.load(overrides_for(folder, "single", *THIRTY_STEPS))) == 0
    return folder


def run_of(folder: Path, strategy: str, ranks: int = 2) -> Path:
    """The uninterrupted run of a strategy, made once."""
    name = f"{strategy}_{ranks}"
    if not (folder / "runs" / name).exists():
        train_ranks(overrides_for(folder, name, *THIRTY_STEPS, f"strategy={strategy}"), ranks)
    return folder / "runs" / name


def assert_close(run: Path, other: Path, bound: float = 1e-6) -> None:
    found, expected = losses(run), losses(other)
    assert len(found) == len(expected) == 30
    assert found == pytest.approx(expected, rel=bound)
    validated = [row["val/loss"] for row in rows(other) if "val/loss" in row]
    assert [row["val/loss"] for row in rows(run) if "val/loss" in row] == pytest.approx(validated, rel=bound)
    norms = [row["grad_norm"] for row in rows(other)]
    assert [row["grad_norm"] for row in rows(run)] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(folder: Path, strategy: str) -> None:
    assert_close(run_of(folder, strategy), folder / "runs" / "single")


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_2", "deepspeed_3"])
def test_resumed_is_bit_equal(folder: Path, strategy: str) -> None:
    whole = run_of(folder, strategy)
    resumed = stopped_at(whole, 10, f"{strategy}_resumed")
    train_ranks(overrides_for(folder, resumed.name, *THIRTY_STEPS, f"strategy={strategy}"), 2)
    assert losses(resumed) == losses(whole)
    assert same_weights(resumed, whole)


@pytest.mark.timeout(400)  # six minutes beside twenty other processes
@pytest.mark.slow
def test_one_process_two_and_four(folder: Path) -> None:
    """Ten steps each, by another strategy each, in one pass, two and one; four ranks share two cores."""
    two = stopped_at(folder / "runs" / "single", 10, "two")
    train_ranks(overrides_for(folder, two.name, *THIRTY_STEPS, "strategy=deepspeed_1", "batch.micro=1"), 2)
    four = stopped_at(two, 20, "four")
    train_ranks(overrides_for(folder, four.name, *THIRTY_STEPS, "strategy=deepspeed_3", "batch.micro=1"), 4)
    assert [row["step"] for row in rows(four, "events.jsonl") if row["event"] == "resumed"] == [10, 20]
    assert_close(four, folder / "runs" / "single")


MOVES = [
    ("deepspeed_3", 2, "ddp", 2),
    ("fsdp", 2, "single", 1),
]
MORE_MOVES = [  # from each strategy and to each, to more processes and to fewer
    ("ddp", 1, "fsdp", 2),
    ("fsdp", 2, "deepspeed_2", 4),
    ("deepspeed_2", 4, "deepspeed_1", 2),
    ("deepspeed_1", 4, "ddp", 1),
    ("deepspeed_3", 2, "fsdp", 4),
    ("deepspeed_1", 1, "deepspeed_3", 2),
]


@pytest.mark.parametrize(
    ("before", "from_ranks", "after", "ranks"),
    MOVES + [pytest.param(*move, marks=pytest.mark.slow) for move in MORE_MOVES],
)
def test_another_strategy_and_number_of_processes_resume(
    folder: Path, before: str, from_ranks: int, after: str, ranks: int
) -> None:
    """As many passes a step as there are samples for a rank, after one pass a step."""
    name = f"{before}_{from_ranks}_{after}_{ranks}"
    moved = stopped_at(run_of(folder, before, from_ranks), 10, name)
    overrides = overrides_for(
        folder, name, *THIRTY_STEPS, "strategy=" + after.replace("single", "auto"), "batch.micro=1"
    )
    if after == "single":
        assert train(launcher.load(overrides)) == 0
    else:
        train_ranks(overrides, ranks)
    assert_close(moved, folder / "runs" / "single")
    shutil.rmtree(moved)
