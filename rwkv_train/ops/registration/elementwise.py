"""The element-wise parts of a block: shift_mix, relu_squared, sigmoid_gate and their backward operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rwkv_train.ops import reference
from rwkv_train.ops.registration.declaration import SelfTestCase, declare, define, differentiate

# shift_mix -----------------------------------------------------------------------------------------------------------

ShiftMixGradients = tuple[Tensor, Tensor, list[Tensor]]  # of x, previous (zeros where there is none) and each mix


def _shift_mix_backward(
    x: Tensor, previous: Tensor | None, mixes: Sequence[Tensor], starts: Tensor | None, grads: Sequence[Tensor]
) -> ShiftMixGradients:
    first = torch.zeros_like(x[:, 0]) if previous is None else previous
    vjp = torch.func.vjp(lambda x, first, *mixes: reference.shift_mix(x, first, mixes, starts), x, first, *mixes)[1]
    dx, dprevious, *dmixes = vjp(list(grads))
    return dx, dprevious, dmixes


# What the CUDA engine registers: its kernels know no starts.
define("shift_mix_one_document(Tensor x, Tensor? previous, Tensor[] mixes) -> Tensor[]")
define(
    "shift_mix_one_document_backward(Tensor x, Tensor? previous, Tensor[] mixes, Tensor[] grads) "
    "-> (Tensor, Tensor, Tensor[])"
)


def _shift_mix_on_cuda(*arguments: Any) -> list[Tensor]:
    x, previous, mixes, starts = arguments
    if starts is not None:  # the CUDA engine has no kernel that takes them
        return reference.shift_mix(*arguments)
    return cast(list[Tensor], torch.ops.rwkv_train.shift_mix_one_document(x, previous, mixes))


def _shift_mix_backward_on_cuda(*arguments: Any) -> ShiftMixGradients:
    x, previous, mixes, starts, grads = arguments
    if starts is not None:
        return _shift_mix_backward(*arguments)
    operator = torch.ops.rwkv_train.shift_mix_one_document_backward
    return cast(ShiftMixGradients, operator(x, previous, mixes, grads))


def _shift_mix_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, previous, mixes, starts = inputs
    ctx.with_previous = previous is not None
    ctx.save_for_backward(x, previous, starts, *mixes)
    ctx.set_materialize_grads(False)


def _shift_mix_gradient(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, previous, starts, *mixes = ctx.saved_tensors
    given = [torch.zeros_like(x) if g is None else g.contiguous() for g in grads]
    dx, dprevious, dmixes = torch.ops.rwkv_train.shift_mix_backward(x, previous, mixes, starts, given)
    return dx, dprevious if ctx.with_previous else None, dmixes, None


declare(
    "elementwise",
    "shift_mix(Tensor x, Tensor? previous, Tensor[] mixes, Tensor? starts) -> Tensor[]",
    reference.shift_mix,
    lambda x, previous, mixes, starts: [torch.empty_like(x) for _ in mixes],
    _shift_mix_on_cuda,
)
declare(
    "elementwise",
    "shift_mix_backward(Tensor x, Tensor? previous, Tensor[] mixes, Tensor? starts, Tensor[] grads) "
    "-> (Tensor, Tensor, Tensor[])",
    _shift_mix_backward,
    lambda x, previous, mixes, *_: (torch.empty_like(x), torch.empty_like(x[:, 0]), [*map(torch.empty_like, mixes)]),
    _shift_mix_backward_on_cuda,
)
differentiate("shift_mix", _shift_mix_setup, _shift_mix_gradient)


# relu_squared --------------------------------------------------------------------------------------------------------


def _relu_squared_backward(h: Tensor, grad: Tensor) -> Tensor:
    return 2 * h.sqrt() * grad


def _relu_squared_setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)  # relu(k) is its square root: k, the widest tensor of a block, need not be kept


def _relu_squared_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.rwkv_train.relu_squared_backward(*ctx.saved_tensors, grad.contiguous()))


declare("elementwise", "relu_squared(Tensor k) -> Tensor", reference.relu_squared, torch.empty_like)
declare(
    "elementwise",
    "relu_squared_backward(Tensor h, Tensor grad) -> Tensor",
    _relu_squared_backward,
    lambda h, grad: torch.empty_like(h),
)
differentiate("relu_squared", _relu_squared_setup, _relu_squared_gradient)


# sigmoid_gate --------------------------------------------------------------------------------------------------------


def _sigmoid_gate_backward(r: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(r)
    return grad * y * (s * torch.sigmoid(-r)), grad * s


declare(
    "elementwise",
    "sigmoid_gate(Tensor r, Tensor y) -> Tensor",
    reference.sigmoid_gate,
    lambda r, y: torch.empty_like(r),
)
declare(
    "elementwise",
    "sigmoid_gate_backward(Tensor r, Tensor y, Tensor grad) -> (Tensor, Tensor)",
    _sigmoid_gate_backward,
    lambda r, y, grad: (torch.empty_like(r), torch.empty_like(y)),
)
differentiate(
    "sigmoid_gate",
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, grad: torch.ops.rwkv_train.sigmoid_gate_backward(*ctx.saved_tensors, grad.contiguous()),
)


# The self-test: two blocks of 64 rows, channels that are no multiple of a vector, documents that begin at block ends.

_B, _T, _C, _MIXES = 2, 70, 40, 3


def _inputs(*names: str) -> dict[str, Tensor]:
    shapes = {"x": (_B, _T, _C), "k": (_B, _T, _C), "r": (_B, _T, _C), "y": (_B, _T, _C), "previous": (_B, _C)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shapes.get(name, (_C,)), generator=generator).double() for name in names}


def _starts() -> Tensor:
    starts = torch.zeros(_B, _T, dtype=torch.bool)
    starts[0, [0, 5, 64]] = starts[1, [33, 69]] = True
    return starts


_mix_names = [f"mix {i}" for i in range(_MIXES)]
_mix_case = partial(
    SelfTestCase,
    inputs=partial(_inputs, "x", "previous", *_mix_names),
    stored=("x", "previous"),
    outputs=tuple(f"output {i}" for i in range(_MIXES)),
    definition=lambda starts, x, previous, *mixes: reference.shift_mix(x, previous, mixes, starts),
    operator=lambda starts, x, previous, *mixes: torch.ops.rwkv_train.shift_mix(x, previous, list(mixes), starts),
)
SELF_TEST_CASES = (
    _mix_case("shift_mix"),
    _mix_case("shift_mix with starts", starts=_starts),
    SelfTestCase(
        "relu_squared",
        inputs=partial(_inputs, "k"),
        stored=("k",),
        outputs=("output",),
        definition=lambda starts, k: [reference.relu_squared(k)],
        operator=lambda starts, k: [torch.ops.rwkv_train.relu_squared(k)],
    ),
    SelfTestCase(
        "sigmoid_gate",
        inputs=partial(_inputs, "r", "y"),
        stored=("r", "y"),
        outputs=("output",),
        definition=lambda starts, r, y: [reference.sigmoid_gate(r, y)],
        operator=lambda starts, r, y: [torch.ops.rwkv_train.sigmoid_gate(r, y)],
    ),
)
