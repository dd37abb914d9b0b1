"""Logits against PyPI `rwkv`, the runtime of the published models, which loads our file."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracles.models import lively_model


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    return importlib.import_module("rwkv.model")


def test_parallel_stepwise_and_halves(runtime: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = lively_model(n_layer=3, n_embd=64, vocab_size=70)
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    theirs = runtime.RWKV(model=str(tmp_path / "ours"), strategy="cpu fp32", verbose=False)
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
