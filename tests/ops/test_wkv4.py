"""The wkv operator: its definition against finite differences, the C++ engine against the definition."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkv_train import ops
from rwkv_train.ops import reference
from rwkv_train.ops.families import FAMILIES
from rwkv_train.ops.registration.wkv4 import CHUNK
from tests.ops.cases import assert_as_good_as, value_and_gradients, wkv4_inputs

EPSILON = torch.finfo(torch.float32).eps


def engine(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The operator as registered, with the C++ engine or not at all."""
    assert FAMILIES["wkv4"].cpp.load()
    y, new_state, _ = torch.ops.rwkv_train.wkv4(w, u, k, v, state, None, chunk)
    return y, new_state


def rounded(inputs: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    return [x.to(dtype).double() for x, dtype in zip(inputs, dtypes, strict=True)]


def check_engine(*draws: list[Tensor], k_dtype: torch.dtype = torch.float32, chunk: int = CHUNK) -> None:
    """Draws of one shape are compared together: with a single channel the definition may be exact by chance."""
    dtypes = [torch.float32, torch.float32, k_dtype, k_dtype, torch.float32]
    runs: list[list[Tensor]] = []
    for operator, working in (
        (reference.wkv4, [torch.float64] * 5),
        (reference.wkv4, dtypes),
        (partial(engine, chunk=chunk), dtypes),
    ):
        results = [
            value_and_gradients(
                operator, [x.to(dtype).double() for x, dtype in zip(inputs, dtypes, strict=True)], working
            )
            for inputs in draws
        ]
        runs.append([torch.stack(parts) for parts in zip(*results, strict=True)])
    truth, definition, ours = runs
    assert_as_good_as(ours, definition, truth, outputs=2, epsilon=EPSILON)


def test_gradcheck_of_the_definition() -> None:
    """In float64, with the state as an input and the whole new state, running maximum included, in the loss."""
    inputs = [x.requires_grad_() for x in wkv4_inputs(2, 5, 3)]
    assert torch.autograd.gradcheck(ops.wkv4, inputs)
    assert torch.autograd.gradcheck(lambda *x: ops.wkv4(*x)[0], inputs[:4])
    assert torch.autograd.gradgradcheck(lambda *x: ops.wkv4(*x)[0], inputs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 128, 130]),
    C=st.sampled_from([1, 7, 8, 31, 64, 100, 200]),
    k_scale=st.sampled_from([0.1, 2.0, 40.0]),
    decay=st.sampled_from([-12.0, -2.0, 0.0, 3.0, 12.0]),
    seed=st.integers(0, 1000),
)
@example(B=1, T=1000, C=33, k_scale=2.0, decay=-4.0, seed=0)
@example(B=1, T=4096, C=16, k_scale=1.0, decay=-8.0, seed=0)
def test_engine_against_definition(B: int, T: int, C: int, k_scale: float, decay: float, seed: int) -> None:
    check_engine(*(wkv4_inputs(B, T, C, k_scale, decay, seed + draw) for draw in range(max(1, 32 // C))))


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
def test_engine_with_any_chunk(chunk: int) -> None:
    check_engine(wkv4_inputs(2, 67, 24), chunk=chunk)


@pytest.mark.parametrize("T", [1, 63, 130])
def test_engine_in_bfloat16(T: int) -> None:
    check_engine(wkv4_inputs(2, T, 40), k_dtype=torch.bfloat16)


def test_keys_at_the_edge() -> None:
    """k = ±80 overflows any sum that is not carried with its maximum."""
    w, u, k, v, state = wkv4_inputs(2, 66, 32)
    check_engine([w, u, 80 * k.sign(), v, state])


def test_a_tie_of_the_maximum_shares_the_gradient() -> None:
    """With w = 0 and constant k every step ties with the past; the definition gives each side half."""
    w, u, k, v, state = wkv4_inputs(1, 4, 8)
    check_engine([0 * w, u, 0 * k + 1, v, 0 * state + 1])


def test_the_first_tokens_without_state() -> None:
    w, u, k, v, _ = (x.float() for x in wkv4_inputs(2, 9, 5))
    y, state = ops.wkv4(w, u, k, v)
    assert torch.allclose(y[:, 0], v[:, 0], rtol=EPSILON, atol=0)  # the average of one value
    again, state_again = ops.wkv4(w, u, k, v, reference.initial_state(k))
    assert torch.equal(y, again)
    assert torch.equal(state, state_again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    w, u, k, v, _ = wkv4_inputs(1, 5, 3)
    y, state = ops.wkv4(w, u, k.to(dtype), v.to(dtype))
    assert y.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_causality() -> None:
    w, u, k, v, state = (x.float() for x in wkv4_inputs(2, 70, 20))
    y, _ = engine(w, u, k, v, state)
    k[:, 40:], v[:, 40:] = 3.0, -1.0
    changed, _ = engine(w, u, k, v, state)
    assert torch.equal(y[:, :40], changed[:, :40])
    assert not torch.equal(y[:, 40], changed[:, 40])


def test_a_constant_added_to_k_changes_nothing() -> None:
    """All exponents are multiples of 2^-6 here, so their sums are exact and the results bit-equal."""
    w, u, k, v, _ = wkv4_inputs(2, 100, 20)
    w, u, k = ((x * 64).round().float() / 64 for x in (w, u, k))
    y, state = ops.wkv4(w, u, k, v.float())
    shifted, shifted_state = ops.wkv4(w, u, k + 64, v.float())
    assert torch.equal(y, shifted)
    assert torch.equal(state[:, 2] + 64, shifted_state[:, 2])


@pytest.mark.parametrize("at", [1, 40, 64, 99])
def test_a_split_with_carried_state_equals_the_whole(at: int) -> None:
    def halves(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        first, state = engine(w, u, k[:, :at].contiguous(), v[:, :at].contiguous(), state)
        second, state = engine(w, u, k[:, at:].contiguous(), v[:, at:].contiguous(), state)
        return torch.cat((first, second), 1), state

    inputs, single = wkv4_inputs(2, 100, 20), [torch.float32] * 5
    whole, parts = value_and_gradients(engine, inputs, single), value_and_gradients(halves, inputs, single)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    truth = value_and_gradients(reference.wkv4, inputs, [torch.float64] * 5)
    definition = value_and_gradients(reference.wkv4, inputs, single)
    assert_as_good_as(parts, definition, truth, outputs=2, epsilon=EPSILON)


def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, single, threads = wkv4_inputs(2, 300, 200), [torch.float32] * 5, torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(value_and_gradients(engine, inputs, single))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_any_strides() -> None:
    w, u, k, v, state = (x.float() for x in wkv4_inputs(2, 20, 12))
    expected = ops.wkv4(w, u, k, v, state)
    strided = [torch.stack((x, x), -1)[..., 0] for x in (w, u, state)]
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (k, v)]
    ours = ops.wkv4(strided[0], strided[1], turned[0], turned[1], strided[2])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    ours[0].sum().backward()  # the gradient arrives expanded, with strides of 0
    assert turned[0].grad is not None


def test_not_a_number_is_not_swallowed() -> None:
    w, u, k, v, state = (x.float() for x in wkv4_inputs(1, 10, 20))
    k[0, 4, 3] = torch.nan
    y, new_state = ops.wkv4(w, u, k, v, state)
    assert y[0, 4:, 3].isnan().all()
    assert new_state[0, :2, 3].isnan().all()  # both sums
    assert y.isnan().sum() == 6


def test_opcheck() -> None:
    inputs = [x.float().requires_grad_() for x in wkv4_inputs(2, 20, 12)]
    torch.library.opcheck(torch.ops.rwkv_train.wkv4.default, (*inputs, None, 8))
    plain = [x.detach() for x in inputs]
    saved = torch.ops.rwkv_train.wkv4(*plain, None, 8)[2]
    for gstate in (None, torch.ones(2, 3, 12)):
        arguments = (*plain, None, saved, torch.ones(2, 20, 12), gstate, 8)
        torch.library.opcheck(torch.ops.rwkv_train.wkv4_backward.default, arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiled_in_one_graph() -> None:
    inputs = [x.float().requires_grad_() for x in wkv4_inputs(2, 70, 12)]

    def loss(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        y, new_state = ops.wkv4(w, u, 2 * k, v, state)
        return y.square().sum() + new_state.square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(ours, plain)


def test_second_derivatives_are_refused() -> None:
    w, u, k, v, state = (x.float().requires_grad_() for x in wkv4_inputs(1, 3, 4))
    (gradient,) = torch.autograd.grad(engine(w, u, k, v, state)[0].square().sum(), [k], create_graph=True)
    with pytest.raises(NotImplementedError, match="RWKV_OPS=reference"):
        gradient.sum().backward()


def test_mistakes_are_named() -> None:
    w, u, k, v, state = (x.float() for x in wkv4_inputs(2, 6, 4))
    cases = [
        ((w[:3], u, k, v), r"w must be \(4,\) to fit k \(2, 6, 4\), not \(3,\)"),
        ((w, u[None], k, v), r"u must be \(4,\)"),
        ((w, u, k[0], v), r"k must be \(B, T, C\).* not \(6, 4\)"),
        ((w, u, k[:, :0], v[:, :0]), r"no empty dimension, not \(2, 0, 4\)"),
        ((w, u, k, v[:1]), r"v must be \(2, 6, 4\)"),
        ((w, u, k, v, state[:, :2]), r"state must be \(2, 3, 4\)"),
        ((w, u, k, v.double()), "k and v must have one dtype, not torch.float32 and torch.float64"),
        ((w, u, k.int(), v.int()), "k must have a floating dtype, not torch.int32"),
        ((w, u, k, v, state.double()), "state must be torch.float32"),
        ((w, u, k, v.to("meta")), "v is on meta but k on cpu"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ops.wkv4(*arguments)
