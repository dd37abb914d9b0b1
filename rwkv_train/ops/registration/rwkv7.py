"""The element-wise parts of RWKV-7's time mix: rwkv7_keys, rwkv7_values and their backward operators."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rwkv_train.ops import reference
from rwkv_train.ops.registration.declaration import SelfTestCase, declare, differentiate

# rwkv7_keys ----------------------------------------------------------------------------------------------------------

Keys = tuple[Tensor, Tensor, Tensor, Tensor]  # w, k, a, b


def _keys_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, head_size, gw, gk, ga, gb = arguments
    vjp = torch.func.vjp(partial(reference.rwkv7_keys, head_size=head_size), *inputs)[1]
    return cast(tuple[Tensor, ...], vjp((gw, gk, ga, gb)))


def _keys_fake(k: Tensor, *_: Any) -> Keys:
    w = torch.empty_like(k, dtype=reference.accumulator(k))
    return w, torch.empty_like(k), torch.empty_like(k), torch.empty_like(k)


declare(
    "rwkv7",
    "rwkv7_keys(Tensor k, Tensor w_delta, Tensor a_delta, Tensor w0, Tensor a0, Tensor k_k, Tensor k_a, int head_size) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.rwkv7_keys,
    _keys_fake,
)
declare(
    "rwkv7",
    "rwkv7_keys_backward(Tensor k, Tensor w_delta, Tensor a_delta, Tensor w0, Tensor a0, Tensor k_k, Tensor k_a, "
    "int head_size, Tensor gw, Tensor gk, Tensor ga, Tensor gb) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _keys_backward,
    lambda *arguments: tuple(torch.empty_like(x) for x in arguments[:7]),
)


def _keys_setup(ctx: Any, inputs: tuple[Any, ...], output: Keys) -> None:
    *tensors, ctx.head_size = inputs
    ctx.save_for_backward(*tensors)


def _keys_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    given = [grad.contiguous() for grad in grads]
    return *torch.ops.rwkv_train.rwkv7_keys_backward(*ctx.saved_tensors, ctx.head_size, *given), None


differentiate("rwkv7_keys", _keys_setup, _keys_gradient)


# rwkv7_values --------------------------------------------------------------------------------------------------------


def _values_backward(*arguments: Tensor) -> tuple[Tensor, ...]:
    *inputs, grad = arguments
    return cast(tuple[Tensor, ...], torch.func.vjp(reference.rwkv7_values, *inputs)[1](grad))


declare(
    "rwkv7",
    "rwkv7_values(Tensor v, Tensor v_first, Tensor v_delta, Tensor v0) -> Tensor",
    reference.rwkv7_values,
    lambda v, *_: torch.empty_like(v),
)
declare(
    "rwkv7",
    "rwkv7_values_backward(Tensor v, Tensor v_first, Tensor v_delta, Tensor v0, Tensor grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _values_backward,
    lambda *arguments: tuple(torch.empty_like(x) for x in arguments[:4]),
)
differentiate(
    "rwkv7_values",
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, grad: torch.ops.rwkv_train.rwkv7_values_backward(*ctx.saved_tensors, grad.contiguous()),
)


# The self-test: two tasks of 64 tokens and a part of one, heads that are no multiple of a vector.

_B, _T, _C, _HEAD = 2, 70, 40, 20


def _inputs(*names: str) -> dict[str, Tensor]:
    activations = {"k", "v", "v_first", "w_delta", "a_delta", "v_delta"}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn((_B, _T, _C) if name in activations else (_C,), generator=generator).double()
        for name in names
    }


SELF_TEST_CASES = (
    SelfTestCase(
        "rwkv7_keys",
        inputs=partial(_inputs, "k", "w_delta", "a_delta", "w0", "a0", "k_k", "k_a"),
        stored=("k", "w_delta", "a_delta"),
        outputs=("w", "k", "a", "b"),
        definition=lambda starts, *inputs: partial(reference.rwkv7_keys, head_size=_HEAD)(*inputs),
        operator=lambda starts, *inputs: torch.ops.rwkv_train.rwkv7_keys(*inputs, _HEAD),
    ),
    SelfTestCase(
        "rwkv7_values",
        inputs=partial(_inputs, "v", "v_first", "v_delta", "v0"),
        stored=("v", "v_first", "v_delta"),
        outputs=("v",),
        definition=lambda starts, *inputs: [reference.rwkv7_values(*inputs)],
        operator=lambda starts, *inputs: [torch.ops.rwkv_train.rwkv7_values(*inputs)],
    ),
)
