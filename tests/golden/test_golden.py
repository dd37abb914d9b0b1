"""Every way of computing the same 50 steps gives the golden losses to 1e-5; bit-equal for the same arithmetic."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkv_train import ops
from rwkv_train.cli import launcher
from rwkv_train.models import build_model, recipe_of
from rwkv_train.models.detect import detect
from rwkv_train.models.weights import shapes_of
from rwkv_train.training.run import train
from tests.golden.make import golden_losses, overrides_of
from tests.runs import losses, same_weights, start

Runner = Callable[..., Path]


@pytest.fixture
def run(arch: str, tmp_path: Path) -> Runner:
    """run(name, *overrides) trains in this process and gives the run's directory."""

    def start_here(name: str, *overrides: str) -> Path:
        threads = torch.get_num_threads()
        try:
            assert train(launcher.load(overrides_of(arch, tmp_path, name, *overrides))) == 0
        finally:
            torch.set_num_threads(threads)
        return tmp_path / "runs" / name

    return start_here


def assert_golden(arch: str, found: list[float]) -> None:
    golden = golden_losses(arch)
    assert len(found) == len(golden) == 50
    assert found == pytest.approx(golden, rel=1e-5)


def test_definition(arch: str, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "ENGINE", "reference")
    assert_golden(arch, losses(run("definition")))


def test_cpp_engine_and_what_must_not_change_a_bit(arch: str, run: Runner) -> None:
    plain = run("plain")
    assert_golden(arch, losses(plain))
    assert losses(plain)[-1] < losses(plain)[0] - 1

    held = torch.load(plain / "weights.pth", weights_only=True)
    model = build_model(detect(shapes_of(held)), seed=1)
    unused = [name for name, row in recipe_of(model).items() if not row.trains(name)]
    assert all(torch.equal(held[name], model.get_parameter(name)) for name in unused), "kept as they were initialised"

    again = run("again")
    recomputed = run("recomputed", "activation_checkpointing=true")
    more_often = run("saved", "checkpoint.every.steps=3", "validation.every.steps=7")
    for other in (again, recomputed, more_often):
        assert losses(other) == losses(plain)
        assert same_weights(other, plain)

    assert_golden(arch, losses(run("accumulated", "batch.micro=1")))


@pytest.mark.slow
def test_compiled(arch: str, run: Runner) -> None:
    assert_golden(arch, losses(run("compiled", "compile=true")))


def test_two_processes_make_one_directory(arch: str, tmp_path: Path) -> None:
    process = start(overrides_of(arch, tmp_path, "two", "trainer.devices=2"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]
    assert_golden(arch, losses(tmp_path / "runs" / "two"))
    assert output.count("model   ") == 1  # one of them speaks
