"""RWKV-4's recurrence: the operators wkv4 and wkv4_backward, and the choice between the CUDA engine's kernels."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rwkv_train.ops import reference
from rwkv_train.ops.registration.declaration import SelfTestCase, declare, define, differentiate

CHUNK = 64  # steps between two saved states: 3/64 of a (B, T, C) tensor. RWKV_CHUNK of cuda/kernels.h
COLUMN = 64  # channels of one block of the parallel CUDA kernels
MIN_SEGMENT_CHUNKS = 16  # segments then need less memory than 1/64 of a (B, T, C) float32 tensor
SEQUENTIAL_COLUMNS = 5  # columns per multiprocessor from which the sequential kernel keeps a GPU busy

Forward = tuple[Tensor, Tensor, Tensor]  # y, the new state, the saved states
Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # gradients of w, u, k, v, state


def _forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, starts: Tensor | None, chunk: int) -> Forward:
    """The definition, which also saves the state before each chunk but the first: (B, (T - 1) // chunk, 3, C)."""
    outputs, states = [], []
    for begin in range(0, k.shape[1], chunk):
        part = slice(begin, begin + chunk)
        starts_part = None if starts is None else starts[:, part]
        y, state = reference.wkv4(w, u, k[:, part], v[:, part], state, starts_part)
        outputs.append(y)
        states.append(state)
    saved = torch.stack(states[:-1], 1) if len(states) > 1 else state.new_empty(state.shape[0], 0, 3, state.shape[2])
    return torch.cat(outputs, 1), state, saved


def _backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    starts: Tensor | None,
    saved: Tensor,
    gy: Tensor,
    gstate: Tensor | None,
    chunk: int,
) -> Backward:
    """The gradient of the definition, chunk by chunk from the end, each from the state saved before it."""
    dw, du, dk, dv = torch.zeros_like(w), torch.zeros_like(u), torch.empty_like(k), torch.empty_like(v)
    dstate = torch.zeros_like(state) if gstate is None else gstate
    before = (state, *saved.unbind(1))
    for index in reversed(range(len(before))):
        part = slice(index * chunk, (index + 1) * chunk)
        definition = partial(reference.wkv4, starts=None if starts is None else starts[:, part])
        # An operator's kernel runs below autograd, so torch.autograd.grad would find no graph here; vjp makes its own.
        vjp = torch.func.vjp(definition, w, u, k[:, part], v[:, part], before[index])[1]
        dw_part, du_part, dk[:, part], dv[:, part], dstate = vjp((gy[:, part], dstate))
        dw, du = dw + dw_part, du + du_part
    return dw, du, dk, dv, dstate


def _forward_fake(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, starts: Tensor | None, chunk: int
) -> Forward:
    B, T, C = k.shape
    return torch.empty_like(k), torch.empty_like(state), state.new_empty(B, (T - 1) // chunk, 3, C)


def _backward_fake(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, *others: Any) -> Backward:
    return tuple(torch.empty_like(x) for x in (w, u, k, v, state))  # type: ignore[return-value]


# The CUDA engine has two operators of its own, which take the cut of time as an argument and know no starts.
# segments: 0 is the sequential kernel, n > 0 the parallel one with time in n segments.
define(
    "wkv4_in_segments(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, int segments) -> (Tensor, Tensor, Tensor)"
)
define(
    "wkv4_in_segments_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, Tensor saved, Tensor gy, "
    "Tensor? gstate, int segments) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def segments_on(B: int, T: int, C: int, multiprocessors: int) -> int:
    """How the CUDA engine cuts (B, T, C) on a GPU: 0 is the sequential kernel, n > 0 the parallel one in n segments.

    Sequential where its warps alone keep the GPU busy. Parallel otherwise; with segments the inputs are read twice, so
    time is cut only where the blocks would leave more than half of the multiprocessors idle, and then into at most two
    blocks per multiprocessor, which all run at once.
    """
    columns = B * -(-C // COLUMN)
    if columns >= SEQUENTIAL_COLUMNS * multiprocessors:
        return 0
    limit = max(1, -(-T // CHUNK) // MIN_SEGMENT_CHUNKS)
    return 1 if 2 * columns > multiprocessors else min(limit, 2 * multiprocessors // columns)


def _segments_for(k: Tensor, chunk: int) -> int:
    if chunk != CHUNK:
        raise ValueError(f"wkv4: the CUDA engine saves a state every {CHUNK} steps, not {chunk}: call it with {CHUNK}")
    B, T, C = k.shape
    return segments_on(B, T, C, torch.cuda.get_device_properties(k.device).multi_processor_count)


def _forward_on_cuda(*arguments: Any) -> Forward:
    w, u, k, v, state, starts, chunk = arguments
    if starts is not None:  # the CUDA engine has no kernel that takes them
        return _forward(*arguments)
    segments = _segments_for(k, chunk)
    return cast(Forward, torch.ops.rwkv_train.wkv4_in_segments(w, u, k, v, state, segments))


def _backward_on_cuda(*arguments: Any) -> Backward:
    w, u, k, v, state, starts, saved, gy, gstate, chunk = arguments
    if starts is not None:
        return _backward(*arguments)
    operator = torch.ops.rwkv_train.wkv4_in_segments_backward
    return cast(Backward, operator(w, u, k, v, state, saved, gy, gstate, _segments_for(k, chunk)))


declare(
    "wkv4",
    "wkv4(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, Tensor? starts, int chunk) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _forward_on_cuda,
)
declare(
    "wkv4",
    "wkv4_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, Tensor? starts, Tensor saved, Tensor gy, "
    "Tensor? gstate, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_on_cuda,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    w, u, k, v, state, starts, ctx.chunk = inputs
    _save(ctx, w, u, k, v, state, starts, output[2])


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(tensors[-1])  # the saved states
    ctx.set_materialize_grads(False)  # an unused state has no gradient: nothing is computed for it


def _gradient(ctx: Any, gy: Tensor | None, gstate: Tensor | None, gsaved: None) -> tuple[Tensor | None, ...]:
    w, u, k, v, state, starts, saved = ctx.saved_tensors
    gy, gstate = _contiguous(k, gy, gstate)
    backward = torch.ops.rwkv_train.wkv4_backward
    return *backward(w, u, k, v, state, starts, saved, gy, gstate, ctx.chunk), None, None


def _contiguous(k: Tensor, gy: Tensor | None, gstate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients as the engines take them: autograd gives any strides, and None for an output that is not used."""
    return torch.zeros_like(k) if gy is None else gy.contiguous(), None if gstate is None else gstate.contiguous()


def _segments_setup(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    w, u, k, v, state, ctx.segments = inputs
    _save(ctx, w, u, k, v, state, output[2])


def _segments_gradient(ctx: Any, gy: Tensor | None, gstate: Tensor | None, gsaved: None) -> tuple[Tensor | None, ...]:
    w, u, k, v, state, saved = ctx.saved_tensors
    gy, gstate = _contiguous(k, gy, gstate)
    backward = torch.ops.rwkv_train.wkv4_in_segments_backward
    return *backward(w, u, k, v, state, saved, gy, gstate, ctx.segments), None


differentiate("wkv4", _setup, _gradient)
differentiate("wkv4_in_segments", _segments_setup, _segments_gradient)


# The self-test: two chunks, channels that are no multiple of a vector, documents that begin around the chunk boundary.

_B, _T, _C = 2, 70, 40


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (_C,), "u": (_C,), "k": (_B, _T, _C), "v": (_B, _T, _C), "state": (_B, 3, _C)}
    inputs = {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    inputs["w"], inputs["k"] = -torch.exp(inputs["w"] - 1), 2 * inputs["k"]
    inputs["state"][:, 1] = inputs["state"][:, 1].exp()  # a denominator is positive
    return inputs


def _starts() -> Tensor:
    starts = torch.zeros(_B, _T, dtype=torch.bool)
    starts[0, [3, 64]] = starts[1, [0, 63]] = True
    return starts


_case = partial(
    SelfTestCase,
    inputs=_inputs,
    stored=("k", "v"),
    outputs=("y", "state"),
    definition=lambda starts, w, u, k, v, state: reference.wkv4(w, u, k, v, state, starts),
    operator=lambda starts, *inputs: torch.ops.rwkv_train.wkv4(*inputs, starts, CHUNK)[:2],
)
SELF_TEST_CASES = (
    _case("wkv4"),
    _case("wkv4 with starts", starts=_starts),
    *(
        _case(
            f"wkv4_in_segments({segments})",
            operator=lambda _, *inputs, segments=segments: torch.ops.rwkv_train.wkv4_in_segments(*inputs, segments)[:2],
            device="cuda",
        )
        for segments in (0, 1, 2)
    ),
)
