"""Our operators in torch.library: schema, fake kernel and autograd of each, declared at import, without any C++.

An engine registers implementations for its device when it is loaded. Until then a call lands in the kernel registered
here for every device, which loads the engine and calls again, or runs the definition where there is no engine. So the
same graph, compiled or not, runs with any engine, and nothing is built while torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rwkv_train.ops import reference
from rwkv_train.ops.build import CPP
from rwkv_train.ops.build_cuda import CUDA
from rwkv_train.ops.cost import segments_on

NAMESPACE = "rwkv_train"
CHUNK = 64  # steps between two saved states of wkv4: 3/64 of a (B, T, C) tensor

KERNELS: dict[str, Callable[..., Any]] = {}  # by operator: what runs until an engine has registered its own

_library = torch.library.Library(NAMESPACE, "DEF")


def _declare(
    schema: str, definition: Callable[..., Any], fake: Callable[..., Any], on_card: Callable[..., Any] | None = None
) -> None:
    """Declares an operator that runs `definition` wherever no engine has an implementation.

    The CUDA engine registers one of its own, or `on_card` calls what it registers.
    """
    name = schema.split("(")[0]

    def kernel(*args: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        engine = {"cpu": CPP, "cuda": CUDA}.get(first.device.type)
        if engine is None or not engine.load():
            return definition(*args)
        if engine is CUDA and on_card is not None:
            return on_card(*args)
        return getattr(torch.ops.rwkv_train, name)(*args)

    KERNELS[name] = kernel
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _differentiate(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives an operator its gradient, and its backward operator an error for second derivatives."""

    def no_second_derivative(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{name} has no second derivative in its engines; RWKV_OPS=reference has it")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=_library)
    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", no_second_derivative, lib=_library)


# wkv4 ----------------------------------------------------------------------------------------------------------------
#
# wkv4_documents is the same recurrence with `starts` (B, T), where it forgets. It is an operator of its own so that an
# engine without it is still whole: the CUDA engine has none, there the definition runs.


def _wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *starts, chunk = rest
    outputs, states = [], []
    for k_part, v_part, *starts_part in zip(*(x.split(chunk, 1) for x in (k, v, *starts)), strict=True):
        y, state = reference.wkv4(w, u, k_part, v_part, state, *starts_part)
        outputs.append(y)
        states.append(state)
    saved = torch.stack(states[:-1], 1) if len(states) > 1 else state.new_empty(state.shape[0], 0, 3, state.shape[2])
    return torch.cat(outputs, 1), state, saved


def _wkv4_backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *starts, saved, gy, gstate, chunk = rest
    dw, du = torch.zeros_like(w), torch.zeros_like(u)
    dk: list[Tensor] = []
    dv: list[Tensor] = []
    gstate = torch.zeros_like(state) if gstate is None else gstate
    split = [x.split(chunk, 1) for x in (k, v, gy, *starts)]
    for k_part, v_part, gy_part, *starts_part, before in reversed(
        list(zip(*split, (state, *saved.unbind(1)), strict=True))
    ):
        definition = partial(_with_starts, *starts_part)
        # An operator's kernel runs below autograd, so torch.autograd.grad would find no graph here; vjp brings its own.
        vjp = torch.func.vjp(definition, w, u, k_part, v_part, before)[1]
        dw_part, du_part, dk_part, dv_part, gstate = vjp((gy_part, gstate))
        dw, du = dw + dw_part, du + du_part
        dk.append(dk_part)
        dv.append(dv_part)
    return dw, du, torch.cat(dk[::-1], 1), torch.cat(dv[::-1], 1), gstate


def _with_starts(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    *starts, w, u, k, v, state = inputs
    return reference.wkv4(w, u, k, v, state, *starts)


def _wkv4_fake(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, T, C = k.shape
    return torch.empty_like(k), torch.empty_like(state), state.new_empty(B, (T - 1) // rest[-1], 3, C)


def _wkv4_backward_fake(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (w, u, k, v, state))


def _wkv4_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.chunk = inputs
    saved = output[2]
    ctx.save_for_backward(*tensors, saved)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)  # an unused state has no gradient: nothing is computed for it


def _wkv4_gradient(ctx: Any, gy: Tensor | None, gstate: Tensor | None, gsaved: None) -> tuple[Tensor | None, ...]:
    w, u, k, v, state, *starts, saved = ctx.saved_tensors
    gy = torch.zeros_like(k) if gy is None else gy.contiguous()  # autograd may hand over any strides
    gstate = None if gstate is None else gstate.contiguous()
    backward = torch.ops.rwkv_train.wkv4_documents_backward if starts else torch.ops.rwkv_train.wkv4_backward
    gradients = backward(w, u, k, v, state, *starts, saved, gy, gstate, ctx.chunk)
    return *gradients, *(None for _ in starts), None


# What the CUDA engine registers: wkv4 with the choice between its kernels as an argument (0: sequential).
_library.define(
    "wkv4_in_segments(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, int segments) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "wkv4_in_segments_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, Tensor saved, Tensor gy, "
    "Tensor? gstate, int segments) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _wkv4_on_card(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, chunk = args
    return cast(tuple[Tensor, Tensor, Tensor], _on_card(torch.ops.rwkv_train.wkv4_in_segments, tensors, chunk))


def _wkv4_backward_on_card(*args: Any) -> tuple[Tensor, ...]:
    *tensors, chunk = args
    return cast(tuple[Tensor, ...], _on_card(torch.ops.rwkv_train.wkv4_in_segments_backward, tensors, chunk))


def _on_card(operator: Callable[..., Any], tensors: list[Any], chunk: int) -> Any:
    if chunk != CHUNK:
        raise ValueError(f"wkv4: the CUDA engine saves a state each {CHUNK} steps, not {chunk}")
    k: Tensor = tensors[2]
    B, T, C = k.shape
    return operator(*tensors, segments_on(B, T, C, torch.cuda.get_device_properties(k.device).multi_processor_count))


_declare(
    "wkv4(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, int chunk) -> (Tensor, Tensor, Tensor)",
    _wkv4,
    _wkv4_fake,
    _wkv4_on_card,
)
_declare(
    "wkv4_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, Tensor saved, Tensor gy, Tensor? gstate, "
    "int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _wkv4_backward,
    _wkv4_backward_fake,
    _wkv4_backward_on_card,
)
_differentiate("wkv4", _wkv4_setup, _wkv4_gradient)
_declare(
    "wkv4_documents(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, Tensor starts, int chunk) "
    "-> (Tensor, Tensor, Tensor)",
    _wkv4,
    _wkv4_fake,
    on_card=_wkv4,
)
_declare(
    "wkv4_documents_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, Tensor starts, Tensor saved, "
    "Tensor gy, Tensor? gstate, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _wkv4_backward,
    _wkv4_backward_fake,
    on_card=_wkv4_backward,
)
_differentiate("wkv4_documents", _wkv4_setup, _wkv4_gradient)


# shift_mix -----------------------------------------------------------------------------------------------------------


def _shift_mix_backward(
    x: Tensor, previous: Tensor | None, mixes: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *starts, grads = rest
    first = torch.zeros_like(x[:, 0]) if previous is None else previous
    vjp = torch.func.vjp(lambda x, first, *mixes: reference.shift_mix(x, first, mixes, *starts), x, first, *mixes)[1]
    dx, dprevious, *dmixes = vjp(list(grads))
    return dx, dprevious, dmixes


def _shift_mix_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, previous, mixes, *starts = inputs
    ctx.with_previous, ctx.with_starts = previous is not None, bool(starts)
    ctx.save_for_backward(x, previous, *mixes, *starts)
    ctx.set_materialize_grads(False)


def _shift_mix_gradient(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, previous, *mixes = ctx.saved_tensors
    starts = [mixes.pop()] if ctx.with_starts else []
    backward = torch.ops.rwkv_train.shift_mix_documents_backward if starts else torch.ops.rwkv_train.shift_mix_backward
    whole = [torch.zeros_like(x) if g is None else g.contiguous() for g in grads]
    dx, dprevious, dmixes = backward(x, previous, mixes, *starts, whole)
    return dx, dprevious if ctx.with_previous else None, dmixes, *(None for _ in starts)


def _shift_mix_fake(x: Tensor, previous: Tensor | None, mixes: Sequence[Tensor], *starts: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for _ in mixes]


def _shift_mix_backward_fake(
    x: Tensor, previous: Tensor | None, mixes: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return torch.empty_like(x), torch.empty_like(x[:, 0]), [torch.empty_like(mix) for mix in mixes]


_declare("shift_mix(Tensor x, Tensor? previous, Tensor[] mixes) -> Tensor[]", reference.shift_mix, _shift_mix_fake)
_declare(
    "shift_mix_backward(Tensor x, Tensor? previous, Tensor[] mixes, Tensor[] grads) -> (Tensor, Tensor, Tensor[])",
    _shift_mix_backward,
    _shift_mix_backward_fake,
)
_differentiate("shift_mix", _shift_mix_setup, _shift_mix_gradient)
_declare(
    "shift_mix_documents(Tensor x, Tensor? previous, Tensor[] mixes, Tensor starts) -> Tensor[]",
    reference.shift_mix,
    _shift_mix_fake,
    on_card=reference.shift_mix,
)
_declare(
    "shift_mix_documents_backward(Tensor x, Tensor? previous, Tensor[] mixes, Tensor starts, Tensor[] grads) "
    "-> (Tensor, Tensor, Tensor[])",
    _shift_mix_backward,
    _shift_mix_backward_fake,
    on_card=_shift_mix_backward,
)
_differentiate("shift_mix_documents", _shift_mix_setup, _shift_mix_gradient)


# relu_squared --------------------------------------------------------------------------------------------------------


def _relu_squared_setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)  # relu(k) = sqrt of it: k, the widest tensor of a block, need not be kept


def _relu_squared_gradient(ctx: Any, grad: Tensor) -> Tensor:
    result: Tensor = torch.ops.rwkv_train.relu_squared_backward(*ctx.saved_tensors, grad.contiguous())
    return result


_declare("relu_squared(Tensor k) -> Tensor", reference.relu_squared, torch.empty_like)
_declare(
    "relu_squared_backward(Tensor h, Tensor grad) -> Tensor",
    lambda h, grad: 2 * h.sqrt() * grad,
    lambda h, grad: torch.empty_like(h),
)
_differentiate("relu_squared", _relu_squared_setup, _relu_squared_gradient)


# sigmoid_gate --------------------------------------------------------------------------------------------------------


def _sigmoid_gate_backward(r: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(r)
    return grad * y * (s * torch.sigmoid(-r)), grad * s


def _sigmoid_gate_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sigmoid_gate_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    dr, dy = torch.ops.rwkv_train.sigmoid_gate_backward(*ctx.saved_tensors, grad.contiguous())
    return dr, dy


_declare("sigmoid_gate(Tensor r, Tensor y) -> Tensor", reference.sigmoid_gate, lambda r, y: torch.empty_like(r))
_declare(
    "sigmoid_gate_backward(Tensor r, Tensor y, Tensor grad) -> (Tensor, Tensor)",
    _sigmoid_gate_backward,
    lambda r, y, grad: (torch.empty_like(r), torch.empty_like(y)),
)
_differentiate("sigmoid_gate", _sigmoid_gate_setup, _sigmoid_gate_gradient)
