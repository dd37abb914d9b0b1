"""Weights in every form that others save: found by the model and, without torch, by the configuration alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rwkv_train.cli.main import main as cli
from rwkv_train.errors import UserError
from rwkv_train.inference.loading import load_model
from rwkv_train.models import ModelConfig, build_model
from rwkv_train.models.detect import detect_file, is_legacy
from rwkv_train.models.weights import load_weights

SHAPE = ModelConfig("rwkv4", 2, 8, 16, 32)
Weights = dict[str, torch.Tensor]
PREFIXES = ("module.", "_forward_module.", "_orig_mod.", "model.", "_forward_module.model.")


@pytest.fixture(scope="module")
def weights() -> Weights:
    return {name: value.clone() for name, value in build_model(SHAPE, 1).state_dict().items()}


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def _save_prefixed(prefix: str, weights: Weights, path: Path) -> None:
    torch.save(prefixed(weights, prefix), path)


def _legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _compiled_blocks(weights: Weights) -> Weights:
    return {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in weights.items()}


FORMS: dict[str, tuple[str, Callable[[Weights, Path], None], str]] = {
    "plain": ("w.pth", torch.save, ""),
    "safetensors": ("w.safetensors", save_file, ""),
    "legacy": ("w.pth", _legacy, ""),
    "legacy and nested": (
        "w.pth",
        lambda w, path: _legacy({"model": w, "step": 3}, path),
        "the weights are below model",
    ),
    **{prefix: ("w.pth", partial(_save_prefixed, prefix), f"without {prefix}") for prefix in PREFIXES},
    "compiled blocks": ("w.pth", lambda w, path: torch.save(_compiled_blocks(w), path), "names without _orig_mod."),
    "lightning": (
        "w.ckpt",
        lambda w, path: torch.save(
            {
                "epoch": 1,
                "state_dict": prefixed(w, "model."),
                "optimizer_states": [{"lr": 0.1}],
                "dtype": torch.float32,
            },
            path,
        ),
        "the weights are below state_dict; names without model.",
    ),
    "prefixed safetensors": (
        "w.safetensors",
        lambda w, path: save_file(prefixed(w, "module."), path),
        "names without module.",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_weights(form: str, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, save, note = FORMS[form]
    save(weights, path := tmp_path / name)
    assert detect_file(path) == SHAPE  # without torch
    found = load_model(path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    said = capsys.readouterr().err
    assert note in said
    assert len(said.splitlines()) == bool(note)
    assert is_legacy(path) == form.startswith("legacy")


AMBIGUOUS: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "it holds several models: model and ema": lambda w: {"model": w, "ema": w},
    "it holds several models: the file itself and model": lambda w: {**w, "model": w},
    "twice, also as module.emb.weight": lambda w: {**w, "module.emb.weight": w["emb.weight"]},
}


@pytest.mark.parametrize("reason", AMBIGUOUS)
def test_what_is_ambiguous_is_refused(reason: str, weights: Weights, tmp_path: Path) -> None:
    torch.save(AMBIGUOUS[reason](weights), path := tmp_path / "w.pth")
    for read in (detect_file, load_weights):
        with pytest.raises(UserError, match=rf"cannot be read as weights: .*{reason}"):
            read(path)


@pytest.mark.parametrize("made", ["cut", "header", "empty", "length", "list"])
def test_a_safetensors_file_that_is_none(made: str, weights: Weights, tmp_path: Path) -> None:
    save_file(weights, path := tmp_path / "w.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes(
        {
            "cut": content[:-100],
            "header": content[:20],
            "empty": b"",
            "length": (2**62).to_bytes(8, "little") + content[8:],
            "list": (2).to_bytes(8, "little") + b"[]" + content[8 + length :],
        }[made]
    )
    with pytest.raises(UserError, match=r"w\.safetensors cannot be read as weights"):
        load_weights(path)
    if made != "cut":  # its header is whole
        with pytest.raises(UserError, match=r"w\.safetensors cannot be read as weights"):
            detect_file(path)


def test_without_the_library_its_name_is_given(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(weights, path := tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert detect_file(path) == SHAPE
    with pytest.raises(UserError, match="the package safetensors is not installed\n  pip install safetensors"):
        load_weights(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_export_takes_what_it_writes_and_refuses_what_is_not_finite(
    name: str, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(weights, tmp_path / "in.pth")
    assert cli(["export", str(tmp_path / "in.pth"), str(tmp_path / name)]) == 0
    assert cli(["export", str(tmp_path / name), str(tmp_path / "again.pth")]) == 0
    found = torch.load(tmp_path / "again.pth")
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    bad = weights["head.weight"].clone()
    bad.view(-1)[7] = float("inf")
    torch.save({**weights, "head.weight": bad}, tmp_path / "bad.pth")
    assert cli(["export", str(tmp_path / "bad.pth"), str(tmp_path / f"bad-{name}")]) == 2
    assert "bad.pth: head.weight has 1 values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / f"bad-{name}").exists()
