"""shift_mix, relu_squared, sigmoid_gate: definitions against finite differences, the engine against the definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkv_train import ops
from rwkv_train.ops import reference
from rwkv_train.ops.families import FAMILIES
from tests.ops.cases import assert_as_good_as, value_and_gradients

SHAPES = [(1, 1, 1), (2, 2, 7), (1, 63, 16), (2, 64, 33), (2, 65, 8), (3, 130, 100)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def mix3(x: Tensor, previous: Tensor, *mixes: Tensor) -> list[Tensor]:
    return ops.shift_mix(x, previous, *mixes)


def without_previous(x: Tensor, *mixes: Tensor) -> list[Tensor]:
    return ops.shift_mix(x, None, *mixes)


def squared(k: Tensor) -> list[Tensor]:
    return [ops.relu_squared(k)]


def gate(r: Tensor, y: Tensor) -> list[Tensor]:
    return [ops.sigmoid_gate(r, y)]


def inputs_of(operator: Callable[..., list[Tensor]], B: int, T: int, C: int) -> list[Tensor]:
    mixes = [draw(1, 1, C, seed=seed).sigmoid().float().double() for seed in (2, 3, 4)]
    return {
        mix3: [draw(B, T, C), draw(B, C, seed=1), *mixes],
        without_previous: [draw(B, T, C), *mixes[:2]],
        squared: [draw(B, T, C)],
        gate: [20 * draw(B, T, C), draw(B, T, C, seed=1)],
    }[operator]


OPERATORS = [mix3, without_previous, squared, gate]


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck_of_the_definition(operator: Callable[..., list[Tensor]]) -> None:
    inputs = [x.requires_grad_() for x in inputs_of(operator, 2, 4, 3)]
    assert torch.autograd.gradcheck(lambda *x: tuple(operator(*x)), inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_against_definition(
    operator: Callable[..., list[Tensor]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert FAMILIES["elementwise"].cpp.load()
    inputs = inputs_of(operator, *shape)
    # The mixes are parameters and stay float32 in the engine; the definition takes them in the dtype of x.
    dtypes = [
        torch.float32 if x.dim() == 3 and x.shape[:2] == (1, 1) and operator in OPERATORS[:2] else dtype for x in inputs
    ]
    dtypes[0] = dtype
    inputs = [x.to(working).double() for x, working in zip(inputs, dtypes, strict=True)]
    ours = value_and_gradients(operator, inputs, dtypes)
    monkeypatch.setattr(ops, "ENGINE", "reference")
    truth = value_and_gradients(operator, inputs, [torch.float64] * len(inputs))
    definition = value_and_gradients(operator, inputs, dtypes)
    assert_as_good_as(ours, definition, truth, outputs=len(ours) - len(inputs), epsilon=torch.finfo(dtype).eps)


@pytest.mark.parametrize("value", [0.0, 1.0, 90.0, 1e4, -90.0, -1e4])
def test_the_gate_at_the_edge(value: float) -> None:
    r = torch.full((1, 1, 40), value, requires_grad=True)
    y = torch.ones(1, 1, 40)
    out = ops.sigmoid_gate(r, y)
    assert torch.allclose(out, torch.sigmoid(r), rtol=1e-6, atol=1e-37)
    out.sum().backward()
    assert r.grad is not None
    assert r.grad.isfinite().all()


def test_the_shift_is_causal_and_starts_with_previous() -> None:
    x, zero = draw(1, 5, 3).float(), torch.zeros(3)
    (shifted,) = ops.shift_mix(x, None, zero)
    assert torch.equal(shifted, reference.token_shift(x, None))
    assert torch.equal(shifted[:, 0], torch.zeros(1, 3))
    (carried,) = ops.shift_mix(x[:, 2:], x[:, 1], zero)
    assert torch.equal(carried, shifted[:, 2:])


def test_an_unused_output() -> None:
    x = draw(2, 9, 4).float().requires_grad_()
    first, _ = ops.shift_mix(x, None, torch.full((4,), 0.25), torch.full((4,), 0.5))
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient[:, :-1], torch.ones(2, 8, 4))
    assert torch.equal(gradient[:, -1], torch.full((2, 4), 0.25))


def test_a_nan_is_not_swallowed() -> None:
    nan = torch.full((1, 1, 20), torch.nan)
    assert ops.relu_squared(nan).isnan().all()
    assert ops.sigmoid_gate(nan, torch.ones(1, 1, 20)).isnan().all()


def test_opcheck() -> None:
    x, previous, *mixes = (x.float().requires_grad_() for x in inputs_of(mix3, 2, 5, 6))
    operators, grads = torch.ops.rwkv_train, [torch.ones(2, 5, 6)] * 3
    flat = [mix.detach().flatten().requires_grad_() for mix in mixes]
    plain = [mix.detach() for mix in flat]
    for before in (None, previous):
        torch.library.opcheck(operators.shift_mix.default, (x, before, flat, None))
        detached = None if before is None else before.detach()
        torch.library.opcheck(operators.shift_mix_backward.default, (x.detach(), detached, plain, None, grads))
    torch.library.opcheck(operators.relu_squared.default, (x,))
    torch.library.opcheck(operators.sigmoid_gate.default, (x, x.detach()))
    for name in ("relu_squared_backward", "sigmoid_gate_backward"):
        count = 2 if name.startswith("relu") else 3
        torch.library.opcheck(getattr(operators, name).default, (x.detach().abs(),) * count)


def test_mistakes_are_named() -> None:
    x = torch.ones(2, 5, 4)
    with pytest.raises(ValueError, match=r"previous must be \(2, 4\) to fit x \(2, 5, 4\), not \(2, 5\)"):
        ops.shift_mix(x, torch.ones(2, 5), torch.ones(4))
    with pytest.raises(ValueError, match=r"1 to 8 mixes of 4 elements are needed, not \[\(3,\)\]"):
        ops.shift_mix(x, None, torch.ones(3))
    with pytest.raises(ValueError, match=r"x must be \(B, T, C\)"):
        ops.shift_mix(x[0], None, torch.ones(4))
    with pytest.raises(ValueError, match=r"must have one shape and dtype"):
        ops.sigmoid_gate(x, x.double())
