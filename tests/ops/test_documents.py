"""Document boundaries in the operators: definition, C++ engine, and that nothing crosses a boundary."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rwkv_train import ops
from rwkv_train.models import ModelConfig, build_model
from rwkv_train.ops import reference
from rwkv_train.ops.families import FAMILIES
from tests.ops.cases import assert_as_good_as, value_and_gradients, wkv4_inputs

EPSILON = torch.finfo(torch.float32).eps


def boundaries(B: int, T: int, *positions: int) -> Tensor:
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, list(positions)] = True
    starts[B - 1, T // 2] = True  # the rows differ
    return starts


def by_hand(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Every document on its own, through the definition without boundaries."""
    rows, states = [], []
    for b in range(len(k)):
        cuts = [0, *(t for t in range(1, k.shape[1]) if starts[b, t]), k.shape[1]]
        carried = reference.initial_state(k[b : b + 1]) if starts[b, 0] else state[b : b + 1]
        parts = []
        for first, last in pairwise(cuts):
            carried = reference.initial_state(k[b : b + 1]) if first else carried
            y, carried = reference.wkv4(w, u, k[b : b + 1, first:last], v[b : b + 1, first:last], carried)
            parts.append(y)
        rows.append(torch.cat(parts, 1))
        states.append(carried)
    return torch.cat(rows), torch.cat(states) + 0 * state  # so that every input has a gradient


@pytest.mark.parametrize(("T", "positions"), [(1, (0,)), (9, (0, 3, 4)), (130, (63, 64, 65, 129)), (200, (0, 1, 128))])
def test_a_boundary_is_a_fresh_text(T: int, positions: tuple[int, ...]) -> None:
    inputs, starts = wkv4_inputs(2, T, 5), boundaries(2, T, *positions)
    double = [torch.float64] * 5
    together = value_and_gradients(partial(ops.wkv4, starts=starts), inputs, double)
    apart = value_and_gradients(partial(by_hand, starts=starts), inputs, double)
    for ours, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "positions"), [(1, (0,)), (67, (0, 3, 64)), (300, (63, 64, 65, 128, 299))])
def test_engine_against_definition(T: int, positions: tuple[int, ...], dtype: torch.dtype) -> None:
    assert FAMILIES["wkv4"].cpp.load()
    starts, inputs = boundaries(3, T, *positions), wkv4_inputs(3, T, 40)
    dtypes = [torch.float32, torch.float32, dtype, dtype, torch.float32]
    inputs = [x.to(kind).double() for x, kind in zip(inputs, dtypes, strict=True)]
    truth = value_and_gradients(partial(reference.wkv4, starts=starts), inputs, [torch.float64] * 5)
    definition = value_and_gradients(partial(reference.wkv4, starts=starts), inputs, dtypes)
    ours = value_and_gradients(partial(ops.wkv4, starts=starts), inputs, dtypes)
    assert_as_good_as(ours, definition, truth, outputs=2, epsilon=EPSILON)


@pytest.mark.parametrize("previous", [False, True])
def test_shift_mix_against_definition(previous: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, before = torch.randn(2, 130, 33, generator=generator), torch.randn(2, 33, generator=generator)
    mixes = torch.rand(3, 33, generator=generator)
    starts = boundaries(2, 130, 0, 1, 63, 64, 128)
    leaves = [x, mixes, *([before] if previous else [])]

    def engine(x: Tensor, mixes: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.shift_mix(x, *(before or (None,)), *mixes, starts=starts))

    def definition(x: Tensor, mixes: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.shift_mix(x, before[0] if before else None, list(mixes), starts))

    single, double = [torch.float32] * len(leaves), [torch.float64] * len(leaves)
    inputs = [leaf.double() for leaf in leaves]
    truth = value_and_gradients(definition, inputs, double)
    assert_as_good_as(
        value_and_gradients(engine, inputs, single),
        value_and_gradients(definition, inputs, single),
        truth,
        outputs=3,
        epsilon=EPSILON,
    )
    shifted = reference.token_shift(x, before, starts)
    assert not shifted[starts].any()
    assert torch.equal(shifted[:, 2:63][~starts[:, 2:63]], x[:, 1:62][~starts[:, 2:63]])


def test_opcheck() -> None:
    starts = boundaries(2, 20, 0, 8, 13)
    inputs = [x.float().requires_grad_() for x in wkv4_inputs(2, 20, 12)]
    torch.library.opcheck(torch.ops.rwkv_train.wkv4.default, (*inputs, starts, 8))
    plain = [x.detach() for x in inputs]
    saved = torch.ops.rwkv_train.wkv4(*plain, starts, 8)[2]
    arguments = (*plain, starts, saved, torch.ones(2, 20, 12), torch.ones(2, 3, 12), 8)
    torch.library.opcheck(torch.ops.rwkv_train.wkv4_backward.default, arguments)
    x, mixes = torch.randn(2, 20, 12).requires_grad_(), [torch.rand(12).requires_grad_() for _ in range(2)]
    torch.library.opcheck(torch.ops.rwkv_train.shift_mix.default, (x, None, mixes, starts))
    given = (x.detach(), None, [mix.detach() for mix in mixes], starts, [torch.ones(2, 20, 12)] * 2)
    torch.library.opcheck(torch.ops.rwkv_train.shift_mix_backward.default, given)


def test_mistakes_are_named() -> None:
    w, u, k, v, _ = (x.float() for x in wkv4_inputs(2, 6, 4))
    with pytest.raises(ValueError, match=r"wkv4: starts must be \(2, 6\) of torch.bool on cpu, not \(2, 5\)"):
        ops.wkv4(w, u, k, v, None, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shift_mix: starts must be .* of torch.int64"):
        ops.shift_mix(k, None, u, starts=torch.zeros(2, 6, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiled_in_one_graph() -> None:
    starts = boundaries(2, 70, 0, 8, 64)
    inputs = [x.float().requires_grad_() for x in wkv4_inputs(2, 70, 12)]

    def loss(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        (mixed,) = ops.shift_mix(k, None, u, starts=starts)
        y, new_state = ops.wkv4(w, u, mixed, v, state, starts)
        return y.square().sum() + new_state.square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_document_a_leaves_every_bit_of_document_b(dtype: torch.dtype, checkpointing: bool) -> None:
    """Logits of B, and all gradients of a loss on B, in one row with two different documents A, and with two tails."""
    model = build_model(ModelConfig("rwkv4", n_layer=2, n_embd=24, vocab_size=50), seed=3).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # the recipe's zeros would hide what passes through them
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(dtype)
    model.activation_checkpointing = checkpointing
    first, last = 61, 150
    starts = torch.zeros(1, 200, dtype=torch.bool)
    starts[0, [0, first, last]] = True
    rows = torch.randint(50, (2, 200), generator=generator)
    rows[1, first:last] = rows[0, first:last]

    def run(row: Tensor, starts: Tensor | None) -> list[Tensor]:
        model.zero_grad()
        logits, _ = model(row[None], starts=starts)
        part = logits[0, first:last]
        part.square().sum().backward()
        return [part.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    one, other = run(rows[0], starts), run(rows[1], starts)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    leaking = run(rows[0], None)[0], run(rows[1], None)[0]
    assert not torch.equal(*leaking), "without boundaries A is seen: the test can fail"
    alone, _ = model(rows[0, None, first:last])
    torch.testing.assert_close(one[0], alone[0].detach())
