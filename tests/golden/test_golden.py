"""Every way of computing the same 50 steps gives the golden losses to 1e-5; bit-equal for the same arithmetic."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkv_train import ops
from rwkv_train.cli import launcher
from rwkv_train.training.run import train
from tests.golden.make import GOLDEN
from tests.runs import losses, overrides_for, same_weights, start

Runner = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    """run(name, *overrides) trains in this process and gives the run's directory."""

    def start_here(name: str, *overrides: str) -> Path:
        threads = torch.get_num_threads()
        try:
            assert train(launcher.load(overrides_for(tmp_path, name, *overrides))) == 0
        finally:
            torch.set_num_threads(threads)
        return tmp_path / "runs" / name

    return start_here


def assert_golden(found: list[float]) -> None:
    golden = [float(line) for line in GOLDEN.read_text().split()]
    assert len(found) == len(golden) == 50
    assert found == pytest.approx(golden, rel=1e-5)


def test_definition(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "ENGINE", "reference")
    assert_golden(losses(run("definition")))


def test_cpp_engine_and_what_must_not_change_a_bit(run: Runner, tmp_path: Path) -> None:
    plain = run("plain")
    assert_golden(losses(plain))
    assert losses(plain)[-1] < losses(plain)[0] - 1

    again = run("again")
    recomputed = run("recomputed", "activation_checkpointing=true")
    more_often = run("saved", "checkpoint.every.steps=3", "validation.every.steps=7")
    for other in (again, recomputed, more_often):
        assert losses(other) == losses(plain)
        assert same_weights(other, plain)

    assert_golden(losses(run("accumulated", "batch.micro=1")))


@pytest.mark.slow
def test_compiled(run: Runner) -> None:
    assert_golden(losses(run("compiled", "compile=true")))


def test_two_processes_make_one_directory(tmp_path: Path) -> None:
    process = start(overrides_for(tmp_path, "two", "trainer.devices=2"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]
    assert_golden(losses(tmp_path / "runs" / "two"))
    assert output.count("model   ") == 1  # one of them speaks
