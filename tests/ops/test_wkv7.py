"""RWKV-7's operator: its definition against finite differences, the C++ engine against the definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkv_train import ops
from rwkv_train.ops import reference
from rwkv_train.ops.families import FAMILIES
from rwkv_train.ops.registration.wkv7 import CHUNK, saved_bytes_per_token
from tests.ops.cases import assert_as_good_as, value_and_gradients, wkv7_inputs

EPSILON = torch.finfo(torch.float32).eps
wkv7: Callable[..., tuple[Tensor, Tensor]] = ops.wkv7
SINGLE, DOUBLE = [torch.float32] * 7, [torch.float64] * 7


def engine(*inputs: Tensor, starts: Tensor | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The operator as registered, with the C++ engine or not at all."""
    assert FAMILIES["wkv7"].cpp.load()
    y, new_state, _ = torch.ops.rwkv_train.wkv7(*inputs, starts, chunk)
    return y, new_state


def check_engine(
    *draws: list[Tensor], dtype: torch.dtype = torch.float32, chunk: int = CHUNK, starts: Tensor | None = None
) -> None:
    """Draws of one shape are compared together: with a single channel the definition may be exact by chance."""
    dtypes = [torch.float32 if i in (1, 6) else dtype for i in range(7)]
    definition = partial(reference.wkv7, starts=starts)
    runs: list[list[Tensor]] = []
    for operator, working in (
        (definition, DOUBLE),
        (definition, dtypes),
        (partial(engine, starts=starts, chunk=chunk), dtypes),
    ):
        results = []
        for inputs in draws:
            exact = [x.to(kind).double() for x, kind in zip(inputs, dtypes, strict=True)]
            results.append(value_and_gradients(operator, exact, working))
        runs.append([torch.stack(parts) for parts in zip(*results, strict=True)])
    truth, plain, ours = runs
    assert_as_good_as(ours, plain, truth, outputs=2, epsilon=EPSILON)


def starts_at(B: int, T: int, *positions: int) -> Tensor:
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, list(positions)] = True
    starts[B - 1, T // 2] = True  # the rows differ
    return starts


def test_the_definition_is_the_equation() -> None:
    r, w, k, v, a, b, state = wkv7_inputs(2, 4, 2, 3)
    y, new_state = wkv7(r, w, k, v, a, b, state)
    for t in range(4):
        along_a = torch.einsum("bhij,bhj->bhi", state, a[:, t])
        state = state @ torch.diag_embed(w[:, t].exp()) + torch.einsum("bhi,bhj->bhij", along_a, b[:, t])
        state = state + torch.einsum("bhi,bhj->bhij", v[:, t], k[:, t])
        torch.testing.assert_close(y[:, t], torch.einsum("bhij,bhj->bhi", state, r[:, t]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_state, state, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_definition() -> None:
    inputs = [x.requires_grad_() for x in wkv7_inputs(2, 4, 1, 3)]
    assert torch.autograd.gradcheck(ops.wkv7, inputs)
    assert torch.autograd.gradcheck(partial(ops.wkv7, starts=starts_at(2, 4, 1)), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: wkv7(*x)[0], inputs)


def test_the_definition_stays_in_float32_under_autocast() -> None:
    inputs = [x.float() for x in wkv7_inputs(1, 6, 1, 8)]
    expected = reference.wkv7(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(reference.wkv7(*inputs), expected, strict=True))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.sampled_from([1, 2, 15, 16, 17, 31, 33, 48]),
    H=st.integers(1, 2),
    N=st.one_of(st.integers(1, 130), st.sampled_from([16, 32, 64, 128])),
    decay=st.sampled_from([-12.0, -2.0, 0.0, 3.0, 12.0]),
    seed=st.integers(0, 1000),
)
@example(B=1, T=33, H=2, N=64, decay=-1.0, seed=0)
@example(B=1, T=33, H=1, N=128, decay=-1.0, seed=0)
@example(B=2, T=40, H=1, N=32, decay=-1.0, seed=0)
@example(B=1, T=20, H=1, N=130, decay=-1.0, seed=0)
@example(B=1, T=300, H=1, N=20, decay=-3.0, seed=0)
def test_engine_against_definition(B: int, T: int, H: int, N: int, decay: float, seed: int) -> None:
    check_engine(*(wkv7_inputs(B, T, H, N, decay, seed + draw) for draw in range(max(1, 16 // N))))


@pytest.mark.parametrize(("T", "N"), [(1, 33), (35, 64)])
def test_engine_in_bfloat16(T: int, N: int) -> None:
    check_engine(wkv7_inputs(2, T, 2, N), dtype=torch.bfloat16)
    check_engine(wkv7_inputs(2, T, 2, N), dtype=torch.bfloat16, starts=starts_at(2, T, 0))


@pytest.mark.parametrize(("T", "positions"), [(1, (0,)), (35, (0, 3, 16)), (70, (15, 16, 17, 32, 69))])
def test_engine_with_documents(T: int, positions: tuple[int, ...]) -> None:
    check_engine(wkv7_inputs(3, T, 2, 20), starts=starts_at(3, T, *positions))
    check_engine(wkv7_inputs(2, T, 1, 64), starts=starts_at(2, T, *positions))


def test_any_decay_is_safe() -> None:
    """Where e^w is 0 in float32 the gradient of w is exactly 0; nothing overflows."""
    r, w, k, v, a, b, state = wkv7_inputs(1, 40, 1, 64)
    choices = torch.tensor([-1e9, -3e38, -88.0, -87.0, -30.0, -5.0, -1e-9, 0.0], dtype=torch.float64)
    w = choices[torch.randint(8, w.shape, generator=torch.Generator().manual_seed(0))].float().double()
    inputs = [r, w, k, v, a, b, state]
    check_engine(inputs)
    gradient = value_and_gradients(engine, inputs, SINGLE)[3]
    assert gradient[w < -87.4].eq(0).all()
    assert gradient[w > -6].ne(0).all()
    inputs[1] = torch.full_like(w, -1e9)
    check_engine(inputs)
    assert value_and_gradients(engine, inputs, SINGLE)[3].eq(0).all()


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_chunk_changes_no_bit(chunk: int) -> None:
    inputs, starts = wkv7_inputs(2, 37, 1, 24), starts_at(2, 37, 5)
    results = [value_and_gradients(partial(engine, starts=starts, chunk=n), inputs, SINGLE) for n in (CHUNK, chunk)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("N", [20, 64])
@pytest.mark.parametrize("at", [1, 16, 29])
def test_a_split_with_carried_state_equals_the_whole(at: int, N: int) -> None:
    """To the last bit, gradients too: a step does not depend on where a chunk begins."""

    def halves(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *tokens, state = inputs
        first, state = engine(*(x[:, :at].contiguous() for x in tokens), state)
        second, state = engine(*(x[:, at:].contiguous() for x in tokens), state)
        return torch.cat((first, second), 1), state

    inputs = wkv7_inputs(2, 45, 1, N)
    whole, parts = value_and_gradients(engine, inputs, SINGLE), value_and_gradients(halves, inputs, SINGLE)
    assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))


@pytest.mark.parametrize("N", [20, 64])
def test_a_document_has_the_same_bits_alone_and_packed(N: int) -> None:
    """Outputs and gradients, at an offset that is no multiple of a chunk, between two other documents."""
    first, last, T = 21, 50, 66
    starts = torch.zeros(1, T, dtype=torch.bool)
    starts[0, [0, first, last]] = True
    leaves = [x.float().requires_grad_() for x in wkv7_inputs(1, T, 2, N)[:6]]
    alone = [x.detach()[:, first:last].clone().requires_grad_() for x in leaves]
    y, state = wkv7(*leaves, starts=starts)
    expected, _ = wkv7(*alone)
    assert torch.equal(y[:, first:last], expected)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    packed = torch.autograd.grad((y * weight).sum() + state.sum(), leaves)
    for ours, single in zip(packed, torch.autograd.grad((expected * weight[:, first:last]).sum(), alone), strict=True):
        assert torch.equal(ours[:, first:last], single)


@pytest.mark.parametrize("T", [65535, 65536, 65537, pytest.param(262145, marks=pytest.mark.slow)])
def test_lengths_at_which_others_fail(T: int) -> None:
    """Against the same engine in parts of other lengths, and at the end against the definition from the state there."""
    cuts = [0, 1000, T // 2 + 3, T - 30, T]
    inputs = [x.float() for x in wkv7_inputs(1, T, 1, 8)]

    def in_parts(*given: Tensor) -> tuple[Tensor, Tensor]:
        *tokens, state = given
        outputs = []
        for first, last in pairwise(cuts):
            y, state = engine(*(x[:, first:last].contiguous() for x in tokens), state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    whole, parts = (value_and_gradients(operator, inputs, SINGLE) for operator in (engine, in_parts))
    assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))
    assert all(x.isfinite().all() for x in whole)
    *tokens, state = inputs
    _, before = engine(*(x[:, : T - 30].contiguous() for x in tokens), state)
    y, after = reference.wkv7(*[x[:, T - 30 :] for x in tokens] + [before])
    torch.testing.assert_close(whole[0][:, T - 30 :].float(), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole[1].float(), after, rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, threads, results = wkv7_inputs(1, 40, 1, 64), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(value_and_gradients(engine, inputs, SINGLE))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_without_a_state_it_begins_at_zero() -> None:
    *tokens, state = (x.float() for x in wkv7_inputs(2, 9, 1, 5))
    for ours, expected in zip(wkv7(*tokens), wkv7(*tokens, 0 * state), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    r, w, k, v, a, b, _ = wkv7_inputs(1, 5, 1, 3)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    y, state = wkv7(r.to(dtype), w.to(accumulator), *(x.to(dtype) for x in (k, v, a, b)))
    assert y.dtype == dtype
    assert state.dtype == accumulator


def test_any_strides() -> None:
    inputs = [x.float() for x in wkv7_inputs(2, 20, 2, 12)]
    expected = wkv7(*inputs)
    strided = [torch.stack((x, x), -1)[..., 0].requires_grad_() for x in inputs]
    ours = wkv7(*strided)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    ours[0].sum().backward()  # the gradient arrives expanded, with strides of 0
    assert all(x.grad is not None for x in strided)


def test_not_a_number_is_not_swallowed() -> None:
    for index in range(6):
        inputs = [x.float() for x in wkv7_inputs(1, 10, 1, 20)]
        inputs[index][0, 4, 0, 3] = torch.nan
        y, state = wkv7(*inputs)
        assert y[0, :4].isfinite().all()
        assert y[0, 4].isnan().any()
        assert index == 0 or state.isnan().any()


def test_opcheck() -> None:
    inputs = [x.float().requires_grad_() for x in wkv7_inputs(2, 20, 1, 6)]
    starts = starts_at(2, 20, 3)
    torch.library.opcheck(torch.ops.rwkv_train.wkv7.default, (*inputs, starts, 8))
    plain = [x.detach() for x in inputs]
    y, state, saved = torch.ops.rwkv_train.wkv7(*plain, None, 8)
    for gstate in (None, torch.ones_like(state)):
        arguments = (*plain, None, saved, torch.ones_like(y), gstate, 8)
        torch.library.opcheck(torch.ops.rwkv_train.wkv7_backward.default, arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiled_in_one_graph() -> None:
    inputs, starts = [x.float().requires_grad_() for x in wkv7_inputs(2, 20, 1, 12)], starts_at(2, 20, 3)

    def loss(*inputs: Tensor) -> Tensor:
        r, *others, state = inputs
        y, new_state = wkv7(2 * r, *others, state, starts)
        return y.square().sum() + new_state.square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(ours, plain)


def test_second_derivatives_are_refused() -> None:
    inputs = [x.float().requires_grad_() for x in wkv7_inputs(1, 3, 1, 4)]
    (gradient,) = torch.autograd.grad(engine(*inputs)[0].square().sum(), [inputs[0]], create_graph=True)
    with pytest.raises(NotImplementedError, match="RWKV_OPS=reference"):
        gradient.sum().backward()


def test_the_saved_bytes_are_those_of_the_operator() -> None:
    inputs = [x.float() for x in wkv7_inputs(1, 16 * CHUNK + 1, 3, 8)]
    saved = torch.ops.rwkv_train.wkv7(*inputs, None, CHUNK)[2]
    assert saved.numel() * 4 == saved_bytes_per_token(3, 8) * 16 * CHUNK


def test_mistakes_are_named() -> None:
    r, w, k, v, a, b, state = (x.float() for x in wkv7_inputs(2, 6, 3, 4))
    cases = [
        ((r[0], w, k, v, a, b), r"wkv7: r must be \(B, T, H, N\).* not \(6, 3, 4\)"),
        ((r[:, :0], w, k, v, a, b), r"no empty dimension, not \(2, 0, 3, 4\)"),
        ((r.int(), w, k, v, a, b), "r must have a floating dtype, not torch.int32"),
        ((r, w[:1], k, v, a, b), r"w must be \(2, 6, 3, 4\) to fit r \(2, 6, 3, 4\), not \(1, 6, 3, 4\)"),
        ((r, w, k[..., :3], v, a, b), r"k must be \(2, 6, 3, 4\)"),
        ((r, w, k, v.double(), a, b), "v must be torch.float32 for r in torch.float32, not torch.float64"),
        ((*(x.bfloat16() for x in (r, w, k, v, a, b)),), "w must be torch.float32 for r in torch.bfloat16"),
        ((r, w, k, v, a, b.to("meta")), "b is on meta but r on cpu"),
        ((r, w, k, v, a, b, state[:, :, :3]), r"state must be \(2, 3, 4, 4\)"),
        (
            (r, w, k, v, a, b, state, torch.zeros(2, 5, dtype=torch.bool)),
            r"wkv7: starts must be \(2, 6\) of torch.bool",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            wkv7(*arguments)
