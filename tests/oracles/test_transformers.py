"""Logits, loss and every gradient against transformers' RwkvForCausalLM, which we did not write."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_train.models import LanguageModel
from tests.oracles.models import in_transformers, lively_model, transformers_twin

SHAPES = [(1, 1, 32), (2, 2, 20), (3, 33, 44), (2, 64, 64)]  # (B, T, C)


def compare(model: LanguageModel, batch: int, length: int) -> tuple[float, float, str]:
    """The largest error of the logits, and of the gradients relative to the largest entry of each, with its name."""
    twin = transformers_twin(model)
    generator = torch.Generator().manual_seed(length)
    text = torch.randint(model.config.vocab_size, (batch, length + 1), generator=generator)
    ours, _ = model(text[:, :-1])
    theirs = twin(text[:, :-1], use_cache=False).logits
    for logits in (ours, theirs):
        F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    of_twin = dict(twin.named_parameters())
    worst, where = 0.0, ""
    for name, parameter in model.named_parameters():
        other = of_twin[in_transformers(name)].grad
        gradients = [
            torch.zeros_like(parameter) if g is None else g for g in (parameter.grad, other)
        ]  # T = 1: no decay
        scale = float(gradients[1].abs().max())
        error = float((gradients[0] - gradients[1]).abs().max()) / max(scale, 1e-9)
        if error > worst:
            worst, where = error, name
    return float((ours - theirs).detach().abs().max()), worst, where


@pytest.mark.parametrize(("batch", "length", "channels"), SHAPES)
def test_float32(batch: int, length: int, channels: int) -> None:
    logits, gradient, name = compare(lively_model(n_embd=channels), batch, length)
    assert logits < 1e-5
    assert gradient < 1e-4, name


@pytest.mark.parametrize(("batch", "length", "channels"), SHAPES)
def test_float64(batch: int, length: int, channels: int) -> None:
    logits, gradient, name = compare(lively_model(n_embd=channels, dtype=torch.float64), batch, length)
    assert logits < 1e-6
    assert gradient < 1e-6, name


def test_a_broken_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison goes red for a model with one wrong sign."""
    model = lively_model()
    model.get_submodule("blocks.1.att").register_forward_hook(lambda module, inputs, output: (-output[0], *output[1:]))
    logits, _, _ = compare(model, 2, 33)
    assert logits > 1e-3
