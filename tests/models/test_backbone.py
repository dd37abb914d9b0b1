"""The complete model: modes, state, activation checkpointing, compilation."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train import ops
from rwkv_train.models import ModelConfig, State, build_model
from rwkv_train.models.detect import detect
from rwkv_train.models.weights import mismatches, shapes_of
from tests.oracles.models import lively_model, small_shape


def text(batch: int, length: int, vocab_size: int = 50) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def test_the_state_is_small_typed_and_of_constant_size(arch: str) -> None:
    model = lively_model(arch=arch)
    empty = model.empty_state(2)
    states = [model(text(2, length))[1] for length in (1, 7, 64)]
    for state in states:
        assert isinstance(state, State)
        assert len(state.layers) == 3
        for layer, before in zip(state.layers, empty.layers, strict=True):
            assert type(layer) is type(before)
            assert layer._fields == tuple(type(before).__annotations__)
            assert [part.shape for part in layer] == [part.shape for part in before]
            assert layer.wkv.dtype == torch.float32


def test_parallel_is_recurrent_and_documents_know_nothing_of_each_other(arch: str) -> None:
    model, tokens = lively_model(arch=arch), text(2, 20)
    whole, end = model(tokens)
    state, logits = model.empty_state(2), []
    for t in range(20):
        one, state = model(tokens[:, t : t + 1], state)
        logits.append(one)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(state.tensors(), end.tensors(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[:, 7] = True
    packed, after = model(tokens, starts=starts)
    alone, end = model(tokens[:, 7:])
    torch.testing.assert_close(packed[:, 7:], alone, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(after.tensors(), end.tensors(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_state(arch: str) -> None:
    """No truncation by default: two halves with carried state give the gradients of the full sequence (float64)."""
    model = lively_model(dtype=torch.float64, arch=arch)
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
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_causality(arch: str) -> None:
    model = lively_model(arch=arch)
    tokens = text(1, 30)
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 50
    assert torch.equal(model(tokens)[0][:, :20], model(changed)[0][:, :20])
    assert not torch.equal(model(tokens)[0][:, 20:], model(changed)[0][:, 20:])


def test_activation_checkpointing_changes_no_bit(arch: str) -> None:
    model = lively_model(arch=arch)
    other = copy.deepcopy(model)
    other.activation_checkpointing = True
    tokens = text(2, 17)
    for network in (model, other):
        F.cross_entropy(network(tokens)[0].flatten(0, 1), tokens.flatten()).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad is not None
            assert two.grad is not None
            assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("grad", [False, True])
def test_a_state_keeps_no_activations(grad: bool, arch: str) -> None:
    """Its shifted inputs are copies, where activations are freed: without gradient, and in recomputed blocks."""
    model = lively_model(arch=arch)
    model.activation_checkpointing = 1
    with torch.set_grad_enabled(grad):
        _, state = model(text(2, 64))
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in state.tensors())


@pytest.mark.parametrize("carried", [False, True])
def test_compiles_into_one_graph(carried: bool, arch: str) -> None:
    model = lively_model(n_layer=2, arch=arch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # tests/golden compiles it for real
    tokens = text(2, 16)
    with torch.no_grad():
        state = model(text(2, 5))[1] if carried else None
    gradients = []
    trained = [p for p in model.parameters() if p.requires_grad]
    for network in (model, compiled):
        logits, _ = network(tokens, state)
        gradients.append(torch.autograd.grad(logits.square().mean(), trained, materialize_grads=True))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


# The arguments of each architecture's recurrence that are products of the input, and so bfloat16 under autocast.
PRODUCTS = {"rwkv4": {"k", "v"}, "rwkv7": {"r", "k", "v", "a", "b"}}


def test_vectors_are_float32_under_autocast(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """bf16-mixed computes products in bfloat16; decay, bonus, mixes and norms stay float32 inside forward."""
    model = lively_model(n_layer=2, arch=arch)
    seen: dict[str, torch.dtype] = {}
    recurrence = f"wkv{arch.removeprefix('rwkv')}"
    plain_wkv: Callable[..., tuple[Tensor, Tensor]] = getattr(ops, recurrence)
    plain_mix = ops.shift_mix
    parameters = list(inspect.signature(plain_wkv).parameters)

    def wkv(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        seen.update({name: x.dtype for name, x in zip(parameters, inputs, strict=False) if x is not None})
        return plain_wkv(*inputs)

    def shift_mix(x: Tensor, previous: Tensor | None, *mixes: Tensor, **more: Tensor | None) -> list[Tensor]:
        seen.update(x=x.dtype, **{f"mix{i}": mix.dtype for i, mix in enumerate(mixes)})
        return plain_mix(x, previous, *mixes, **more)

    monkeypatch.setattr(ops, recurrence, wkv)
    monkeypatch.setattr(ops, "shift_mix", shift_mix)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = model(text(1, 4))
    assert {name for name, dtype in seen.items() if dtype == torch.bfloat16} == PRODUCTS[arch]
    assert {dtype for name, dtype in seen.items() if name not in PRODUCTS[arch]} == {torch.float32}
    assert state.layers[0].wkv.dtype == torch.float32


def test_detection(arch: str) -> None:
    shape = replace(small_shape(arch), dim_ffn=40)
    model = build_model(shape, device="meta")
    assert detect(shapes_of(model.state_dict())) == model.config


def test_mismatches() -> None:
    model = build_model(ModelConfig("rwkv4", 2, 24, 60, dim_ffn=40))
    other = build_model(ModelConfig("rwkv4", 1, 24, 61, dim_ffn=40))
    found = mismatches(shapes_of(model.state_dict()), other)
    assert found[0] == "emb.weight has shape (60, 24), this model (61, 24)"
    assert any("blocks.1." in line and "is not in this model" in line for line in found)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="n_embd is 0"):
        build_model(ModelConfig("rwkv4", 2, 0, 60))
    with pytest.raises(ValueError, match="arch is 'rwkv9'; valid: rwkv4, rwkv7"):
        build_model(ModelConfig("rwkv9", 2, 8, 60))
