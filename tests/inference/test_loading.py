"""A model is loaded from every form in which weights are kept, sharded checkpoints included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rwkv_train.checkpoint.name import find_weights
from rwkv_train.cli import launcher
from rwkv_train.cli.main import main as cli
from rwkv_train.errors import UserError
from rwkv_train.inference.loading import description_of, load_model
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


def test_a_run_stands_for_its_weights_wherever_a_checkpoint_does(tmp_path: Path) -> None:
    """A run without final weights for its newest complete checkpoint; `export`, `init.weights`, `generate`, `eval`."""
    run, model = tmp_path / "run", lively(BYTES)
    newest = checkpoint_of(model, run / "checkpoints", 2)
    (run / "checkpoints" / "step_000000012-0001").mkdir()  # incomplete
    assert find_weights(run) == newest
    assert cli(["export", str(run), str(tmp_path / "out.pth")]) == 0
    found = torch.load(tmp_path / "out.pth")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    config = launcher.load(["data.tokenizer=bytes", f"init.weights={run}"])
    assert (config.arch, config.model.n_layer, config.model.n_embd) == ("rwkv4", 2, 64)
    assert description_of(run) is not None
    (tmp_path / "out.pth").rename(run / "weights.pth")
    assert find_weights(run) == run / "weights.pth"
    assert find_weights(newest) == newest
    assert find_weights(tmp_path) == tmp_path


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = checkpoint_of(lively(), tmp_path, 2)
    (path / "weights_0001_of_0002.pth").unlink()
    with pytest.raises(UserError, match=r"weights_0001_of_0002\.pth"):
        load_model(path)
    with pytest.raises(UserError, match="there is no file"):
        load_model(tmp_path / "nothing.pth")
