"""init.weights=: the shape of a model is read from its file before torch is imported, and a wrong file is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rwkv_train.cli.checks import Machine
from rwkv_train.cli.configure import ConfigBuilder, config_builder
from rwkv_train.errors import UserError, UserErrors
from rwkv_train.models import ModelConfig, build_model
from rwkv_train.models.detect import detect
from rwkv_train.models.weights import shapes_of
from rwkv_train.resources import resource
from tests.oracles.models import small_shape
from tests.runs import save_weights


@pytest.fixture
def conf() -> Iterator[ConfigBuilder]:
    with config_builder([resource("conf")], Machine(cores=2)) as made:
        yield made


def mistakes(conf: ConfigBuilder, *overrides: str) -> list[UserError]:
    with pytest.raises(UserErrors) as caught:
        conf.build(["run.root=no-such-folder", "data.tokenizer=bytes", *overrides])
    return caught.value.problems


def test_the_shape_comes_from_the_weights(conf: ConfigBuilder, tmp_path: Path) -> None:
    path = save_weights(tmp_path / "w.pth", n_layer=12, n_embd=768, vocab_size=300)
    model = conf.build(["data.tokenizer=bytes", f"init.weights={path}"]).model
    assert (model.size, model.n_layer, model.n_embd, model.dim_ffn, model.vocab_size) == ("169m", 12, 768, 3072, 300)
    assert conf.build(["data.tokenizer=bytes", f"init.weights={path}"]).optim.lr == 6e-4
    assert (
        conf.build(["data.tokenizer=bytes", f"init.weights={path}", "model=169m", "model.vocab_size=300"]).model
        == model
    )
    (problem,) = mistakes(conf, f"init.weights={path}", "model.n_layer=24")
    assert problem.what == f"model.n_layer=24, but init.weights={path} has 12"
    layers, channels = mistakes(conf, f"init.weights={path}", "model=430m")
    assert ("n_layer=24" in layers.what, "n_embd=1024" in channels.what) == (True, True)

    odd = save_weights(tmp_path / "odd.pth", n_layer=3, n_embd=40)
    config = conf.build(["data.tokenizer=bytes", f"init.weights={odd}", "optim.lr=1e-3", "optim.final_lr=1e-4"])
    assert (config.model.size, config.model.n_layer) == ("L3C40", 3)
    (problem,) = mistakes(conf, f"init.weights={odd}")
    assert "optim.lr=… optim.final_lr=…" in problem.remedy


def test_low_rank_widths_come_from_the_weights(conf: ConfigBuilder, tmp_path: Path) -> None:
    """Each width on its own: one that agrees is no contradiction, and each that differs is one line."""
    extra = {"decay_low_rank_dim": 96, "a_low_rank_dim": 96, "v_low_rank_dim": 64, "gate_low_rank_dim": 128}
    model = build_model(ModelConfig("rwkv7", 24, 2048, 256, extra=extra), device="meta")
    held = {name: size for name, size in shapes_of(model.state_dict()).items() if not re.search(r"\.0\.att\.v\d", name)}
    (tmp_path / "meta.json").write_text(json.dumps({"shapes": held}))
    weights, decay, gate = (
        f"init.weights={tmp_path}",
        "model.extra.decay_low_rank_dim",
        "model.extra.gate_low_rank_dim",
    )
    found = conf.build(["data.tokenizer=bytes", weights, f"{decay}=96"]).model
    assert found.size == "1b5"
    assert found.extra == extra
    (problem,) = mistakes(conf, weights, f"{decay}=96", f"{gate}=64")
    assert problem.what == f"{gate}=64, but {weights} has 128"
    (problem,) = mistakes(conf, weights, "model=1b5")
    assert problem.what == f"{gate}=256, but {weights} has 128"
    (problem,) = mistakes(conf, weights, "model.extra.unknown=3")
    assert "model.extra.unknown=3: arch=rwkv7 has no such width" in problem.what


class Shell:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was run')",)


def test_weights_that_are_none(conf: ConfigBuilder, tmp_path: Path) -> None:
    whole = save_weights(tmp_path / "w.pth", n_layer=2, n_embd=64)
    torn = tmp_path / "torn.pth"
    torn.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"torn\.pth cannot be read as weights"):
        conf.build([f"init.weights={torn}"])
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the weights of a language model"):
        conf.build([f"init.weights={tmp_path / 'other.pth'}"])
    torch.save({"a": Shell()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"it asks for .*exec"):
        conf.build([f"init.weights={tmp_path / 'evil.pth'}"])


@pytest.mark.parametrize(
    ("release", "extra"),
    [
        ("RWKV-7a", "blocks.0.ffn.s_emb.weight"),
        ("RWKV-7b", "blocks.0.qkv.weight"),
        ("RWKV-8", "blocks.1.ffn.enn.weight"),
    ],
)
def test_experimental_successors_are_named(release: str, extra: str) -> None:
    shapes = shapes_of(build_model(small_shape("rwkv7"), device="meta").state_dict())
    with pytest.raises(UserError, match=f"^here holds weights of {release}, which this version cannot train") as caught:
        detect({**shapes, extra: (3, 3)}, "here")
    assert caught.value.remedy == "known: arch=rwkv4, rwkv7"
