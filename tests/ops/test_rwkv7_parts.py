"""rwkv7_keys, rwkv7_values, head_norm: definitions against finite differences, the engines against the definitions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rwkv_train import ops
from rwkv_train.ops.families import FAMILIES
from tests.ops.cases import assert_as_good_as, value_and_gradients

SHAPES = [(1, 1, 20, 20), (2, 65, 40, 20), (1, 130, 128, 64), (2, 3, 96, 32), (3, 7, 6, 3)]  # B, T, C, head size
Operator = Callable[..., list[Tensor]]


@pytest.fixture(autouse=True)
def engines() -> None:
    """Without them each call would run the definition, and every comparison pass."""
    assert FAMILIES["rwkv7"].cpp.load()
    assert FAMILIES["head_norm"].cpp.load()


def keys(*inputs: Tensor, head_size: int) -> list[Tensor]:
    call: Callable[..., tuple[Tensor, ...]] = ops.rwkv7_keys
    return list(call(*inputs, head_size))


def values(*inputs: Tensor, head_size: int) -> list[Tensor]:
    call: Callable[..., Tensor] = ops.rwkv7_values
    return [call(*inputs)]


def norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *current: Tensor, head_size: int) -> list[Tensor]:
    given = (current[0], current[1], current[2], current[3]) if current else None
    return [ops.head_norm(y, gate, weight, bias, head_size, 64e-5, given)]


FORMS: dict[
    str, tuple[Operator, str]
] = {  # operator, and whether each input is an activation (B, T, C) or a parameter (C)
    "keys": (keys, "aaapppp"),
    "values": (values, "aaap"),
    "norm": (norm, "aapp"),
    "norm with the current token": (norm, "aappaaap"),
}


def draw(form: str, B: int, T: int, C: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((B, T, C) if kind == "a" else (C,), generator=generator).double() for kind in FORMS[form][1]]


def dtypes_of(form: str, dtype: torch.dtype) -> list[torch.dtype]:
    return [dtype if kind == "a" else torch.float32 for kind in FORMS[form][1]]


def compare(form: str, inputs: list[Tensor], head_size: int, dtype: torch.dtype, patch: pytest.MonkeyPatch) -> None:
    operator, dtypes = partial(FORMS[form][0], head_size=head_size), dtypes_of(form, dtype)
    inputs = [x.to(working).double() for x, working in zip(inputs, dtypes, strict=True)]
    ours = value_and_gradients(operator, inputs, dtypes)
    patch.setattr(ops, "ENGINE", "reference")
    truth = value_and_gradients(operator, inputs, [torch.float64] * len(inputs))
    definition = value_and_gradients(operator, inputs, dtypes)
    epsilon = torch.finfo(dtype).eps
    assert_as_good_as(ours, definition, truth, outputs=len(ours) - len(inputs), epsilon=epsilon)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_the_definition(form: str) -> None:
    inputs = [x.requires_grad_() for x in draw(form, 2, 2, 6)]
    assert torch.autograd.gradcheck(lambda *x: tuple(FORMS[form][0](*x, head_size=3)), inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_against_definition(
    form: str, shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    B, T, C, head_size = shape
    compare(form, draw(form, B, T, C), head_size, dtype, monkeypatch)


@pytest.mark.parametrize("form", FORMS)
def test_logits_at_the_edge(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """σ(±100): nothing overflows, and the gradients that vanish are finite."""
    inputs = draw(form, 2, 9, 40)
    inputs[1], inputs[2] = 100 * inputs[1].sign(), 100 * inputs[2].sign() if form in ("keys", "values") else inputs[2]
    compare(form, inputs, 20, torch.float32, monkeypatch)


def test_a_key_of_zeros() -> None:
    """Divided by the smallest norm, as torch.nn.functional.normalize does it: zeros, and finite gradients."""
    inputs = [x.float() for x in draw("keys", 1, 2, 40)]
    inputs[0][0, 0] = 0
    leaves = [x.requires_grad_() for x in inputs]
    w, k, a, b = keys(*leaves, head_size=20)
    assert all(x[0, 0].eq(0).all() for x in (k, a, b))
    for gradient in torch.autograd.grad((w.sum() + k.sum() + a.sum() + b.sum()), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_not_a_number_is_not_swallowed(form: str) -> None:
    for index in range(len(FORMS[form][1])):
        inputs = [x.float() for x in draw(form, 1, 3, 40)]
        inputs[index].view(-1)[5] = torch.nan
        assert any(x.isnan().any() for x in FORMS[form][0](*inputs, head_size=20))


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_changes_no_bit(form: str) -> None:
    operator, threads, results = partial(FORMS[form][0], head_size=20), torch.get_num_threads(), []
    inputs = draw(form, 3, 150, 200)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(value_and_gradients(operator, inputs, dtypes_of(form, torch.float32)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_opcheck() -> None:
    namespace = torch.ops.rwkv_train
    inputs = {form: [x.float().requires_grad_() for x in draw(form, 2, 5, 12)] for form in FORMS}
    plain = {form: [x.detach() for x in given] for form, given in inputs.items()}
    ones = torch.ones(2, 5, 12)
    torch.library.opcheck(namespace.rwkv7_keys.default, (*inputs["keys"], 6))
    torch.library.opcheck(namespace.rwkv7_keys_backward.default, (*plain["keys"], 6, ones, ones, ones, ones))
    torch.library.opcheck(namespace.rwkv7_values.default, tuple(inputs["values"]))
    torch.library.opcheck(namespace.rwkv7_values_backward.default, (*plain["values"], ones))
    for form, none in (("norm", [None] * 4), ("norm with the current token", [])):
        torch.library.opcheck(namespace.head_norm.default, (*inputs[form], *none, 6, 1e-5))
        torch.library.opcheck(namespace.head_norm_backward.default, (*plain[form], *none, 6, 1e-5, ones))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_compiled_in_one_graph(form: str) -> None:
    inputs = [x.float().requires_grad_() for x in draw(form, 2, 5, 12)]

    def loss(*given: Tensor) -> Tensor:
        return torch.stack([x.square().sum() for x in FORMS[form][0](*given, head_size=6)]).sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(ours, plain)


def test_mistakes_are_named() -> None:
    k, w_delta, a_delta, *parameters = (x.float() for x in draw("keys", 2, 3, 12))
    cases: list[tuple[tuple[Tensor, ...], int, str]] = [
        (
            (k[0], w_delta, a_delta, *parameters),
            6,
            r"rwkv7_keys: k must be \(B, T, C\) of a floating dtype, not \(3, 12\)",
        ),
        ((k, w_delta.bfloat16(), a_delta, *parameters), 6, "w_delta must be .* as k is, not .*torch.bfloat16"),
        ((k, w_delta, a_delta[:1], *parameters), 6, r"a_delta must be \(2, 3, 12\)"),
        ((k, w_delta, a_delta, parameters[0][:5], *parameters[1:]), 6, "w0 must have 12 elements"),
        ((k, w_delta, a_delta, *parameters), 5, "12 channels are no whole number of heads of 5"),
    ]
    for inputs, head_size, message in cases:
        with pytest.raises(ValueError, match=message):
            keys(*inputs, head_size=head_size)
