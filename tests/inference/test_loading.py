"""A model is loaded from every form in which weights are kept, sharded checkpoints included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rwkv_train.cli.main import main as cli
from rwkv_train.errors import UserError
from rwkv_train.inference.loading import load_model
from rwkv_train.models import ModelConfig
from tests.inference.test_export import checkpoint_of, lively

BYTES = ModelConfig("rwkv4", 2, 64, 256)


@pytest.mark.parametrize("writers", [1, 3])
def test_checkpoints(tmp_path: Path, writers: int) -> None:
    model = lively()
    loaded = load_model(checkpoint_of(model, tmp_path, writers))
    assert loaded.config == model.config
    for (name, wanted), found in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name


def test_files_of_other_dtypes_and_run_directories(tmp_path: Path) -> None:
    weights = {name: value.bfloat16() for name, value in lively().state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    for path in (tmp_path / "weights.pth", tmp_path):
        loaded = load_model(path)
        assert loaded.emb.weight.dtype == torch.float32
        assert all(torch.equal(value, weights[name].float()) for name, value in loaded.state_dict().items())


def test_generate_and_eval_read_a_sharded_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = lively(BYTES), tmp_path / "held_out.txt"
    text.write_text("to be or not to be\n" * 9)
    torch.save(model.state_dict(), tmp_path / "one.pth")
    results = []
    for path in (tmp_path / "one.pth", checkpoint_of(model, tmp_path, 2)):
        assert cli(["generate", str(path), "--prompt", "to", "--tokens", "8", "--seed", "3", "--json"]) == 0
        generated = json.loads(capsys.readouterr().out)["texts"]
        assert cli(["eval", str(path), "--data", str(text), "--context", "16", "--json", "--device", "cpu"]) == 0
        results.append((generated, json.loads(capsys.readouterr().out)["all"]["nats_per_token"]))
    assert results[0] == results[1]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = checkpoint_of(lively(), tmp_path, 2)
    (path / "weights_0001_of_0002.pth").unlink()
    with pytest.raises(UserError, match=r"weights_0001_of_0002\.pth"):
        load_model(path)
    with pytest.raises(UserError, match="there is no file"):
        load_model(tmp_path / "nothing.pth")
