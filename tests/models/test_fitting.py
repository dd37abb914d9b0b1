"""Published files of others: without the tensors that nothing uses, and with vectors of other shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_train.cli.main import main as cli
from rwkv_train.inference.loading import load_model
from rwkv_train.models import ModelConfig, build_model
from rwkv_train.models.detect import detect_file
from tests.oracles.models import lively

WIDTHS = {"decay_low_rank_dim": 8, "a_low_rank_dim": 12, "v_low_rank_dim": 4, "gate_low_rank_dim": 96}
SHAPE = ModelConfig("rwkv7", 2, 128, 40, 512, 64, WIDTHS)
UNUSED = [f"blocks.0.att.v{number}" for number in range(3)]
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return {name: value.clone() for name, value in lively(SHAPE).state_dict().items()}


def without_unused(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if name not in UNUSED}


def _vectors(weights: Weights) -> Weights:
    return {name: value.squeeze() if "x_" in name or name[-1] == "0" else value for name, value in weights.items()}


def _flat_bonus(weights: Weights) -> Weights:
    return {name: value.flatten() if name.endswith("r_k") else value for name, value in weights.items()}


def _more_dimensions(weights: Weights) -> Weights:
    return {name: value[None, None] if value.dim() < 3 and "att" in name else value for name, value in weights.items()}


FORMS: dict[str, Callable[[Weights], Weights]] = {
    "vectors (C)": _vectors,
    "r_k (C)": _flat_bonus,
    "(1, 1, C), (1, 1, H, N), (1, 1, C, D)": _more_dimensions,
    "without v0, v1, v2 of the first layer": without_unused,
    "all of it": lambda w: _vectors(_flat_bonus(without_unused(w))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_published_files(
    form: str, dtype: torch.dtype, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {name: value.to(dtype) for name, value in FORMS[form](weights).items()}
    torch.save(given, path := tmp_path / "w.pth")
    assert detect_file(path) == SHAPE  # without torch
    complete = len(given) == len(weights)
    initial = build_model(SHAPE).state_dict()
    expected = {name: (weights if complete or name not in UNUSED else initial)[name].to(dtype) for name in weights}
    found = load_model(path).state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in expected.items())
    note = f"{path}: {', '.join(UNUSED)} are not in it, and nothing uses them: they get their initial values\n"
    assert capsys.readouterr().err == ("" if complete else note)

    released = tmp_path / "rwkv7-g1x-1.5b-20261201-ctx4096.pth"
    assert cli(["export", str(path), str(released)]) == 0
    exported = torch.load(released, weights_only=True)
    assert list(exported) == list(expected)
    for name, value in expected.items():
        assert exported[name].dtype == dtype
        assert exported[name].shape == value.shape, name
        assert torch.equal(exported[name], value), name


def test_what_differs_in_dtype_keeps_its_precision(weights: Weights, tmp_path: Path) -> None:
    given = {name: value.bfloat16() if value.dim() == 2 else value for name, value in weights.items()}
    torch.save(given, tmp_path / "w.pth")
    assert cli(["export", str(tmp_path / "w.pth"), str(tmp_path / "out.pth")]) == 0
    exported = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(exported[name], value.float()) for name, value in given.items())


def test_one_layer_without_them(weights: Weights, tmp_path: Path) -> None:
    shape = replace(SHAPE, n_layer=1)
    torch.save(without_unused(lively(shape).state_dict()), path := tmp_path / "w.pth")
    default = build_model(replace(shape, extra={}), device="meta").config.extra["v_low_rank_dim"]
    assert load_model(path).config.extra == {**WIDTHS, "v_low_rank_dim": default}


def test_vectors_of_rwkv4(tmp_path: Path) -> None:
    shape = ModelConfig("rwkv4", 2, 8, 16, 32)
    expected = lively(shape).state_dict()
    given = {
        name: value.flatten() if "mix" in name else value[None, None] if "att.time" in name else value
        for name, value in expected.items()
    }
    torch.save(given, path := tmp_path / "w.pth")
    assert detect_file(path) == shape
    found = load_model(path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


DIFFERENT: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a transposed matrix": (
        lambda w: {**w, "blocks.1.att.w2": w["blocks.1.att.w2"].T},
        "blocks.1.att.w2 has shape (128, 8), this model (8, 128)",
    ),
    "a vector of another size": (
        lambda w: {**w, "blocks.1.att.x_r": torch.zeros(127)},
        "blocks.1.att.x_r has shape (127,), this model (1, 1, 128)",
    ),
    "a tensor that is used": (
        lambda w: {name: value for name, value in w.items() if name != "blocks.1.att.v0"},
        "blocks.1.att.v0 is missing",
    ),
    "heads that do not divide the channels": (
        lambda w: {**w, "blocks.0.att.r_k": torch.zeros(3, 43)},
        "holds no model that can be built: n_embd is 128; it must be a multiple of head_size, 43",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_what_is_not_the_same_is_refused_in_two_lines(
    difference: str, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = DIFFERENT[difference]
    torch.save({name: value.contiguous() for name, value in change(weights).items()}, tmp_path / "w.pth")
    assert cli(["generate", str(tmp_path / "w.pth"), "--tokenizer", "bytes"]) == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'w.pth'}" in printed
    assert reason in printed
    assert len(printed.splitlines()) == 2
