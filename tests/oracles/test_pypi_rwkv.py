"""Logits against PyPI `rwkv`, the runtime of the published models, which loads our file."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_train.inference.export import export
from rwkv_train.models import ModelConfig
from tests.oracles.models import lively

# The shapes of RWKV-7 have the low-rank widths of the released sizes 0.1b and 13.3b.
WIDTHS = ("decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
SHAPES = [
    ModelConfig("rwkv4", n_layer=3, n_embd=64, vocab_size=70),
    ModelConfig("rwkv7", 3, 128, 70, head_size=32),
    ModelConfig("rwkv7", 2, 192, 70, extra=dict(zip(WIDTHS, (64, 64, 32, 128), strict=True))),
    ModelConfig("rwkv7", 1, 128, 70, dim_ffn=96, extra=dict(zip(WIDTHS, (192, 192, 128, 384), strict=True))),
]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The module for a generation, which it chooses while it is imported."""

    def load(arch: str) -> Any:
        monkeypatch.setenv("RWKV_JIT_ON", "0")
        monkeypatch.setenv("RWKV_CUDA_ON", "0")
        monkeypatch.setenv("RWKV_V7_ON", "1" if arch == "rwkv7" else "0")
        monkeypatch.delitem(sys.modules, "rwkv.model", raising=False)
        return importlib.import_module("rwkv.model")

    return load


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # RWKV-7's functions are scripted on import
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.arch} L{shape.n_layer} C{shape.n_embd}")
def test_parallel_stepwise_and_halves(
    runtime: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: ModelConfig
) -> None:
    model = lively(shape)
    given = model.state_dict()
    if shape.extra:  # as files of others are: without what nothing uses, and with vectors of one dimension
        given = {
            name: v.squeeze() if "x_" in name else v
            for name, v in given.items()
            if not re.search(r"\.0\.att\.v\d", name)
        }
    torch.save(given, tmp_path / "others.pth")
    export(tmp_path / "others.pth", tmp_path / "ours.pth")
    theirs = runtime(shape.arch).RWKV(model=str(tmp_path / "ours"), strategy="cpu fp32")
    text = torch.randint(70, (41,), generator=torch.Generator().manual_seed(1))
    expected, memory = [], None
    for token in text.tolist():
        logits, memory = theirs.forward([token], memory)
        expected.append(logits.clone())
    truth = torch.stack(expected)  # (T, V)

    with torch.no_grad():
        parallel, after = model(text[None])
        assert (parallel[0] - truth).abs().max() < 1e-4 * truth.abs().max()

        state, rows = None, []
        for token in text:
            logits, state = model(token[None, None], state)
            rows.append(logits[0, 0])
        assert (torch.stack(rows) - truth).abs().max() < 1e-4 * truth.abs().max()
        assert state is not None
        for whole, stepwise in zip(after, state, strict=True):
            torch.testing.assert_close(whole, stepwise, rtol=1e-4, atol=1e-5)

        first, state = model(text[None, :17])
        second, _ = model(text[None, 17:], state)
        assert (torch.cat([first, second], 1)[0] - truth).abs().max() < 1e-4 * truth.abs().max()
