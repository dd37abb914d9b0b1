"""head_norm, what follows the recurrence of RWKV-5, 6 and 7, and its backward operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwkv_train.ops import reference
from rwkv_train.ops.registration.declaration import SelfTestCase, declare, differentiate

_INPUTS = (
    "Tensor y, Tensor gate, Tensor weight, Tensor bias, Tensor? r, Tensor? k, Tensor? v, Tensor? r_k, "
    "int head_size, float eps"
)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, head_size, eps, grad = arguments
    given = [x for x in inputs if x is not None]
    none = [None] * (len(inputs) - len(given))
    definition = partial(reference.head_norm, head_size=head_size, eps=eps)
    gradients = torch.func.vjp(lambda *x: definition(*x, *none), *given)[1](grad)
    return *gradients, *(grad.new_empty(0, dtype=torch.float32) for _ in none)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    y, inputs = arguments[0], arguments[:8]
    return tuple(y.new_empty(0, dtype=torch.float32) if x is None else torch.empty_like(x) for x in inputs)


declare("head_norm", f"head_norm({_INPUTS}) -> Tensor", reference.head_norm, lambda y, *_: torch.empty_like(y))
declare(
    "head_norm",
    f"head_norm_backward({_INPUTS}, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.head_size, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    grads = torch.ops.rwkv_train.head_norm_backward(*inputs, ctx.head_size, ctx.eps, grad.contiguous())
    return *(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None, None


differentiate("head_norm", _setup, _gradient)


# The self-test: two tasks of 64 tokens and a part of one, heads that are no multiple of a vector.

_B, _T, _C, _HEAD, _EPS = 2, 70, 40, 20, 64e-5


def _case_inputs(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn((_C,) if name in ("weight", "bias", "r_k") else (_B, _T, _C), generator=generator).double()
        for name in names
    }


_definition: Callable[..., Tensor] = partial(reference.head_norm, head_size=_HEAD, eps=_EPS)
_plain, _with_bonus = ("y", "gate", "weight", "bias"), ("y", "gate", "weight", "bias", "r", "k", "v", "r_k")
SELF_TEST_CASES = (
    SelfTestCase(
        "head_norm",
        inputs=partial(_case_inputs, *_plain),
        stored=("y", "gate"),
        outputs=("output",),
        definition=lambda starts, *inputs: [_definition(*inputs, None, None, None, None)],
        operator=lambda starts, *inputs: [torch.ops.rwkv_train.head_norm(*inputs, None, None, None, None, _HEAD, _EPS)],
    ),
    SelfTestCase(
        "head_norm with the current token",
        inputs=partial(_case_inputs, *_with_bonus),
        stored=("y", "gate", "r", "k", "v"),
        outputs=("output",),
        definition=lambda starts, *inputs: [_definition(*inputs)],
        operator=lambda starts, *inputs: [torch.ops.rwkv_train.head_norm(*inputs, _HEAD, _EPS)],
    ),
)
