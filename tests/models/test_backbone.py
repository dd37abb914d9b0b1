"""The complete model: modes, state, activation checkpointing, compilation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train import ops
from rwkv_train.models import ModelConfig, State, build_model
from rwkv_train.models.detect import detect
from rwkv_train.models.rwkv4 import LayerState
from rwkv_train.models.weights import mismatches, shapes_of
from tests.oracles.models import lively_model


def text(batch: int, length: int, vocab_size: int = 50) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def test_the_state_is_small_typed_and_of_constant_size() -> None:
    model = lively_model()
    states = [model(text(2, length))[1] for length in (1, 7, 64)]
    for state in states:
        assert isinstance(state, State)
        assert len(state.layers) == 3
        for layer in state.layers:
            assert isinstance(layer, LayerState)
            assert (layer.att_x.shape, layer.wkv.shape, layer.ffn_x.shape) == ((2, 32), (2, 3, 32), (2, 32))
            assert layer.wkv.dtype == torch.float32


def test_gradients_flow_through_the_state() -> None:
    """No truncation by default: two halves with carried state give the gradients of the full sequence (float64)."""
    model = lively_model(dtype=torch.float64)
    tokens = text(2, 24)
    whole, _ = model(tokens)
    whole.square().mean().backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    first, state = model(tokens[:, :11])
    second, _ = model(tokens[:, 11:], state)
    torch.cat([first, second], 1).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_causality() -> None:
    model = lively_model()
    tokens = text(1, 30)
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 50
    assert torch.equal(model(tokens)[0][:, :20], model(changed)[0][:, :20])
    assert not torch.equal(model(tokens)[0][:, 20:], model(changed)[0][:, 20:])


def test_activation_checkpointing_changes_no_bit() -> None:
    model = lively_model()
    other = copy.deepcopy(model)
    other.activation_checkpointing = True
    tokens = text(2, 17)
    for network in (model, other):
        F.cross_entropy(network(tokens)[0].flatten(0, 1), tokens.flatten()).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("grad", [False, True])
def test_a_state_keeps_no_activations(grad: bool) -> None:
    """Its shifted inputs are copies, where activations are freed: without gradient, and in recomputed blocks."""
    model = lively_model()
    model.activation_checkpointing = 1
    with torch.set_grad_enabled(grad):
        _, state = model(text(2, 64))
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in state.tensors())


@pytest.mark.parametrize("carried", [False, True])
def test_compiles_into_one_graph(carried: bool) -> None:
    model = lively_model(n_layer=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # tests/golden compiles it for real
    tokens = text(2, 16)
    with torch.no_grad():
        state = model(text(2, 5))[1] if carried else None
    gradients = []
    for network in (model, compiled):
        logits, _ = network(tokens, state)
        gradients.append(torch.autograd.grad(logits.square().mean(), list(model.parameters()), materialize_grads=True))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_vectors_are_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16-mixed computes products in bfloat16; decay, bonus, mixes and norms stay float32 inside forward."""
    model = lively_model(n_layer=1)
    seen: dict[str, torch.dtype] = {}
    plain_wkv, plain_mix = ops.wkv4, ops.shift_mix

    def wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        seen.update(w=w.dtype, u=u.dtype, k=k.dtype)
        return plain_wkv(w, u, k, v, *rest)

    def shift_mix(x: Tensor, previous: Tensor | None, *mixes: Tensor, **more: Tensor | None) -> list[Tensor]:
        seen.update(x=x.dtype, **{f"mix{i}": mix.dtype for i, mix in enumerate(mixes)})
        return plain_mix(x, previous, *mixes, **more)

    monkeypatch.setattr(ops, "wkv4", wkv4)
    monkeypatch.setattr(ops, "shift_mix", shift_mix)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = model(text(1, 4))
    assert seen.pop("k") == torch.bfloat16
    assert set(seen.values()) == {torch.float32}
    assert state.layers[0].wkv.dtype == torch.float32


def test_detection_and_mismatches() -> None:
    model = build_model(ModelConfig("rwkv4", 2, 24, 60, dim_ffn=40))
    assert detect(shapes_of(model.state_dict())) == model.config
    other = build_model(ModelConfig("rwkv4", 1, 24, 61, dim_ffn=40))
    found = mismatches(shapes_of(model.state_dict()), other)
    assert found[0] == "emb.weight has shape (60, 24), this model (61, 24)"
    assert any("blocks.1." in line and "is not in this model" in line for line in found)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="n_embd is 0"):
        build_model(ModelConfig("rwkv4", 2, 0, 60))
    with pytest.raises(ValueError, match="arch is 'rwkv9'; valid: rwkv4"):
        build_model(ModelConfig("rwkv9", 2, 8, 60))
