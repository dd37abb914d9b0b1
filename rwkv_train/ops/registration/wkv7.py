"""RWKV-7's recurrence: the operators wkv7 and wkv7_backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwkv_train.ops import reference
from rwkv_train.ops.registration.declaration import SelfTestCase, declare, differentiate

CHUNK = 16  # steps between two saved states

Forward = tuple[Tensor, Tensor, Tensor]  # y, the new state, the saved states
Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # gradients of r, w, k, v, a, b, state


def saved_bytes_per_token(H: int, N: int) -> int:
    """Bytes that `wkv7` keeps for the backward pass beside its arguments: a float32 state every CHUNK tokens."""
    return 4 * H * N * N // CHUNK


def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    starts: Tensor | None,
    chunk: int,
) -> Forward:
    """The definition, which also saves the state before each chunk but the first: (B, (T - 1) // chunk, H, N, N)."""
    outputs, states = [], []
    for begin in range(0, r.shape[1], chunk):
        part = slice(begin, begin + chunk)
        definition = partial(reference.wkv7, starts=None if starts is None else starts[:, part])
        y, state = definition(*[x[:, part] for x in (r, w, k, v, a, b)] + [state])
        outputs.append(y)
        states.append(state)
    saved = torch.stack(states[:-1], 1) if len(states) > 1 else state.unsqueeze(1)[:, :0].clone()
    return torch.cat(outputs, 1), state, saved


def _backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    starts: Tensor | None,
    saved: Tensor,
    gy: Tensor,
    gstate: Tensor | None,
    chunk: int,
) -> Backward:
    """The gradient of the definition, chunk by chunk from the end, each from the state saved before it."""
    inputs = (r, w, k, v, a, b)
    gradients = [torch.empty_like(x) for x in inputs]
    dstate = torch.zeros_like(state) if gstate is None else gstate
    before = (state, *saved.unbind(1))
    for index in reversed(range(len(before))):
        part = slice(index * chunk, (index + 1) * chunk)
        definition = partial(reference.wkv7, starts=None if starts is None else starts[:, part])
        # An operator's kernel runs below autograd, so torch.autograd.grad would find no graph here; vjp makes its own.
        vjp = torch.func.vjp(definition, *(x[:, part] for x in inputs), before[index])[1]
        *parts, dstate = vjp((gy[:, part], dstate))
        for whole, gradient in zip(gradients, parts, strict=True):
            whole[:, part] = gradient
    dr, dw, dk, dv, da, db = gradients
    return dr, dw, dk, dv, da, db, dstate


def _forward_fake(r: Tensor, *others: Any) -> Forward:
    (*_, state, _, chunk), (B, T, H, N) = others, r.shape
    return torch.empty_like(r), torch.empty_like(state), state.new_empty(B, (T - 1) // chunk, H, N, N)


def _backward_fake(*arguments: Any) -> Backward:
    return tuple(torch.empty_like(x) for x in arguments[:7])  # type: ignore[return-value]


declare(
    "wkv7",
    "wkv7(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor state, Tensor? starts, int chunk) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
declare(
    "wkv7",
    "wkv7_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor state, Tensor? starts, "
    "Tensor saved, Tensor gy, Tensor? gstate, int chunk) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    *tensors, ctx.chunk = inputs
    saved = output[2]
    ctx.save_for_backward(*tensors, saved)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)  # an unused state has no gradient: nothing is computed for it


def _gradient(ctx: Any, gy: Tensor | None, gstate: Tensor | None, gsaved: None) -> tuple[Tensor | None, ...]:
    r, *others = ctx.saved_tensors
    gy = torch.zeros_like(r) if gy is None else gy.contiguous()  # autograd gives any strides
    gstate = None if gstate is None else gstate.contiguous()
    return *torch.ops.rwkv_train.wkv7_backward(r, *others, gy, gstate, ctx.chunk), None, None


differentiate("wkv7", _setup, _gradient)


# The self-test: three chunks, channels that are no multiple of a vector, documents that begin around chunk boundaries.

_B, _T, _H, _N = 2, 35, 2, 20


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(_B, _T, _H, _N, generator=generator).double() for name in ("r", "w", "k", "v", "a")}
    inputs["a"] = torch.nn.functional.normalize(inputs["a"], dim=-1)
    inputs["w"], inputs["b"] = -torch.exp(inputs["w"] - 1), -inputs["a"] * torch.sigmoid(inputs["k"])
    inputs["state"] = torch.randn(_B, _H, _N, _N, generator=generator).double()
    return inputs


def _starts() -> Tensor:
    starts = torch.zeros(_B, _T, dtype=torch.bool)
    starts[0, [3, 16]] = starts[1, [0, 15, 32]] = True
    return starts


_case = partial(
    SelfTestCase,
    inputs=_inputs,
    stored=("r", "k", "v", "a", "b"),
    outputs=("y", "state"),
    definition=lambda starts, *inputs: partial(reference.wkv7, starts=starts)(*inputs),
    operator=lambda starts, *inputs: torch.ops.rwkv_train.wkv7(*inputs, starts, CHUNK)[:2],
)
SELF_TEST_CASES = (_case("wkv7"), _case("wkv7 with starts", starts=_starts))
