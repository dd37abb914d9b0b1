"""The operators. Each has one definition (reference.py) and engines that compute the same faster (cuda/).

`RWKV_OPS=reference|cpp|cuda` demands an engine; without it, or with `auto`, the fastest available one runs.
`RWKV_OPS_CACHE=DIRECTORY` is where compiled engines are looked for, and built, before any other directory.
"""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import Tensor

from rwkv_train.errors import UserError
from rwkv_train.ops import build, reference
from rwkv_train.ops.build import CppEngine
from rwkv_train.ops.build_cuda import CudaEngine
from rwkv_train.ops.registration import wkv4 as wkv4_registration
from rwkv_train.ops.registration import wkv7 as wkv7_registration
from rwkv_train.ops.selftest import EngineReport, engines
from rwkv_train.user_path import user_path

__all__ = [
    "EngineReport",
    "engines",
    "head_norm",
    "relu_squared",
    "rwkv7_keys",
    "rwkv7_values",
    "shift_mix",
    "sigmoid_gate",
    "wkv4",
    "wkv7",
]

_DEVICES: dict[str, str] = {engine.name: engine.device for engine in (CppEngine, CudaEngine)}
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {engine.device: engine.dtypes for engine in (CppEngine, CudaEngine)}

ENGINES = ("auto", "reference", *_DEVICES)
ENGINE = os.environ.get("RWKV_OPS", "auto")
if ENGINE not in ENGINES:
    raise UserError(f"RWKV_OPS={ENGINE} names no engine", f"valid are {', '.join(ENGINES)}")
build.SETTINGS.required = ENGINE if ENGINE in _DEVICES else None
if cache := os.environ.get("RWKV_OPS_CACHE"):
    build.SETTINGS.cache = user_path(cache)


def _runs_by_definition(x: Tensor) -> bool:
    """Whether the definition runs on x: on demand, and where no engine runs on the device or computes in the dtype.

    Raises UserError when an engine is demanded that does not run on x's device.
    """
    device = x.device.type
    demanded = _DEVICES.get(ENGINE, device)
    if demanded != device and device in _DTYPES:
        raise UserError(
            f"RWKV_OPS={ENGINE} demands an engine for {demanded}, and a tensor is on {x.device}",
            "move the model and its inputs there, or unset RWKV_OPS",
        )
    return ENGINE == "reference" or x.dtype not in _DTYPES.get(device, ())


def wkv4(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RWKV-4's weighted average of past values (arXiv 2305.13048, equation 14), with gradients for every argument.

        wkv_t = (Σ_{i<t} e^{(t-1-i)w + k_i} v_i + e^{u+k_t} v_t) / (Σ_{i<t} e^{(t-1-i)w + k_i} + e^{u+k_t})

    The recurrence is computed in float32 whatever the dtype of k (float64 when k is float64).

    Args:
        w: (C) decay per step, negative: -exp(time_decay).
        u: (C) bonus of the current token: time_first.
        k: (B, T, C), T ≥ 1.
        v: (B, T, C) in the dtype of k.
        state: (B, 3, C) numerator, denominator and running maximum before the first token; None: the empty state.
        starts: (B, T) bool, true at the first token of each document: the state before it is the empty one. None: the
            rows have no boundaries.

    Returns:
        wkv (B, T, C) in the dtype of k, and the state after the last token (B, 3, C).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check_wkv4(w, u, k, v, state)
    _check_starts("wkv4", k, starts)
    accumulator = reference.accumulator(k)
    w, u = w.to(accumulator).contiguous(), u.to(accumulator).contiguous()
    state = reference.initial_state(k) if state is None else state.to(accumulator).contiguous()
    if _runs_by_definition(k):
        return reference.wkv4(w, u, k, v, state, starts)
    starts = None if starts is None else starts.contiguous()
    y, new_state, _ = torch.ops.rwkv_train.wkv4(
        w, u, k.contiguous(), v.contiguous(), state, starts, wkv4_registration.CHUNK
    )
    return y, new_state


def _check_starts(name: str, x: Tensor, starts: Tensor | None) -> None:
    if starts is None:
        return
    if starts.shape != x.shape[:2] or starts.dtype != torch.bool or starts.device != x.device:
        raise ValueError(
            f"{name}: starts must be {tuple(x.shape[:2])} of torch.bool on {x.device}, "
            f"not {tuple(starts.shape)} of {starts.dtype} on {starts.device}"
        )


def _check_wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> None:
    if k.dim() != 3 or 0 in k.shape:
        raise ValueError(f"wkv4: k must be (B, T, C) with no empty dimension, not {tuple(k.shape)}")
    B, _, C = k.shape
    expected = {"w": (w, (C,)), "u": (u, (C,)), "v": (v, tuple(k.shape))}
    if state is not None:
        expected["state"] = (state, (B, 3, C))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"wkv4: {name} must be {shape} to fit k {tuple(k.shape)}, not {tuple(tensor.shape)}")
        if tensor.device != k.device:
            raise ValueError(f"wkv4: {name} is on {tensor.device} but k on {k.device}")
    for name, tensor in (("w", w), ("u", u), ("k", k)):
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"wkv4: {name} must have a floating dtype, not {tensor.dtype}")
    if v.dtype != k.dtype:
        raise ValueError(f"wkv4: k and v must have one dtype, not {k.dtype} and {v.dtype}")
    if state is not None and state.dtype != reference.accumulator(k):
        raise ValueError(f"wkv4: state must be {reference.accumulator(k)} for k in {k.dtype}, not {state.dtype}")


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's generalised delta rule (arXiv 2503.14456), with gradients for every argument.

        S_t = S_{t-1} diag(e^{w_t}) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ,  y_t = S_t r_t

    RWKV-7 takes a = -κ and b = κ ⊙ (its learning rate). The recurrence is computed in float32 whatever the dtype of r
    (float64 when r is float64).

    Args:
        r: (B, T, H, N): receptance of H heads of N channels, T ≥ 1.
        w: (B, T, H, N) logarithm of the decay, ≤ 0, in float32 (float64 when r is float64). Any such value is safe:
            where e^w underflows the decay is 0, and so is its gradient.
        k: as r, in the dtype of r; likewise v, a and b.
        state: (B, H, N, N) S before the first token, indexed [value, key], in the dtype of w; None: zeros.
        starts: (B, T) bool, true at the first token of each document: the state before it is zero. None: the rows have
            no boundaries.

    Returns:
        y (B, T, H, N) in the dtype of r, and the state after the last token (B, H, N, N).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check_wkv7(r, w, k, v, a, b, state)
    _check_starts("wkv7", r, starts)
    if state is None:
        B, _, H, N = r.shape
        state = w.new_zeros(B, H, N, N)
    if _runs_by_definition(r):
        return reference.wkv7(r, w, k, v, a, b, state, starts)
    inputs = [x.contiguous() for x in (r, w, k, v, a, b, state)]
    starts = None if starts is None else starts.contiguous()
    y, new_state, _ = torch.ops.rwkv_train.wkv7(*inputs, starts, wkv7_registration.CHUNK)
    return y, new_state


def _check_wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None) -> None:
    if r.dim() != 4 or 0 in r.shape:
        raise ValueError(f"wkv7: r must be (B, T, H, N) with no empty dimension, not {tuple(r.shape)}")
    if not r.dtype.is_floating_point:
        raise ValueError(f"wkv7: r must have a floating dtype, not {r.dtype}")
    B, _, H, N = r.shape
    shape, accumulator = tuple(r.shape), reference.accumulator(r)
    expected = {name: (x, shape, r.dtype) for name, x in (("k", k), ("v", v), ("a", a), ("b", b))}
    expected["w"] = (w, shape, accumulator)
    if state is not None:
        expected["state"] = (state, (B, H, N, N), accumulator)
    for name, (tensor, wanted, dtype) in expected.items():
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"wkv7: {name} must be {wanted} to fit r {shape}, not {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise ValueError(f"wkv7: {name} must be {dtype} for r in {r.dtype}, not {tensor.dtype}")
        if tensor.device != r.device:
            raise ValueError(f"wkv7: {name} is on {tensor.device} but r on {r.device}")


def shift_mix(x: Tensor, previous: Tensor | None, *mixes: Tensor, starts: Tensor | None = None) -> list[Tensor]:
    """Token shift and interpolation: x_t · μ + x_{t-1} · (1 - μ) for each μ.

    Args:
        x: (B, T, C).
        previous: (B, C) the row before the first; None: zeros.
        mixes: 1 to 8 of C elements each, in any shape (checkpoints have (1, 1, C)).
        starts: (B, T) bool, true at the first token of each document: the row before it counts as zeros. None: the
            rows have no boundaries.

    Returns:
        One (B, T, C) in the dtype of x per mix.

    Raises:
        ValueError: a shape does not fit.
    """
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"shift_mix: x must be (B, T, C) with no empty dimension, not {tuple(x.shape)}")
    B, _, C = x.shape
    if previous is not None and tuple(previous.shape) != (B, C):
        raise ValueError(f"shift_mix: previous must be {(B, C)} to fit x {tuple(x.shape)}, not {tuple(previous.shape)}")
    if not 1 <= len(mixes) <= 8 or any(mix.numel() != C for mix in mixes):
        raise ValueError(f"shift_mix: 1 to 8 mixes of {C} elements are needed, not {[tuple(m.shape) for m in mixes]}")
    _check_starts("shift_mix", x, starts)
    if _runs_by_definition(x):
        return reference.shift_mix(x, previous, mixes, starts)
    before = None if previous is None else previous.to(x.dtype).contiguous()
    weights = [mix.float().contiguous() for mix in mixes]
    starts = None if starts is None else starts.contiguous()
    return cast("list[Tensor]", torch.ops.rwkv_train.shift_mix(x.contiguous(), before, weights, starts))


def relu_squared(k: Tensor) -> Tensor:
    """relu(k)², any shape and floating dtype. Only the result is kept for the backward pass, not k."""
    if _runs_by_definition(k):
        return reference.relu_squared(k)
    return cast(Tensor, torch.ops.rwkv_train.relu_squared(k.contiguous()))


def sigmoid_gate(r: Tensor, y: Tensor) -> Tensor:
    """σ(r) ⊙ y, both of one shape and dtype. Raises ValueError when they are not."""
    if r.shape != y.shape or r.dtype != y.dtype:
        raise ValueError(
            f"sigmoid_gate: r {tuple(r.shape)} {r.dtype} and y {tuple(y.shape)} {y.dtype} must have one shape and dtype"
        )
    if _runs_by_definition(r):
        return reference.sigmoid_gate(r, y)
    return cast(Tensor, torch.ops.rwkv_train.sigmoid_gate(r.contiguous(), y.contiguous()))


def _check_alike(name: str, activations: dict[str, Tensor], parameters: dict[str, Tensor], head_size: int = 1) -> None:
    """Refuses activations that are not (B, T, C) of one dtype, and parameters that have not C elements."""
    first, x = next(iter(activations.items()))
    if x.dim() != 3 or 0 in x.shape or not x.dtype.is_floating_point:
        raise ValueError(f"{name}: {first} must be (B, T, C) of a floating dtype, not {tuple(x.shape)} of {x.dtype}")
    for key, tensor in activations.items():
        if tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name}: {key} must be {tuple(x.shape)} of {x.dtype} on {x.device}, as {first} is, not "
                f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
    for key, tensor in parameters.items():
        if tensor.numel() != x.shape[2]:
            raise ValueError(f"{name}: {key} must have {x.shape[2]} elements, not {tuple(tensor.shape)}")
    if head_size < 1 or x.shape[2] % head_size:
        raise ValueError(f"{name}: {x.shape[2]} channels are no whole number of heads of {head_size}")


def rwkv7_keys(
    k: Tensor, w_delta: Tensor, a_delta: Tensor, w0: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, head_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `wkv7` takes beside r and v, from RWKV-7's keys and low-rank outputs (arXiv 2503.14456, section 4).

    With α = σ(a0 + Δa), the in-context learning rate, and κ = k ⊙ k_k divided by its norm in each head:
    w = -e^(-1/2) · σ(w0 + Δw), k ⊙ (1 + (α - 1) ⊙ k_a), a = -κ, b = κ ⊙ α. Computed in float32 whatever the dtype of k
    (float64 when k is float64).

    Args:
        k: (B, T, C); likewise w_delta and a_delta, in the dtype of k.
        w0: C elements in any shape; likewise a0, k_k and k_a.
        head_size: channels of a head.

    Returns:
        w in float32 (float64 when k is); k, a and b in the dtype of k; all (B, T, C).

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    parameters = {"w0": w0, "a0": a0, "k_k": k_k, "k_a": k_a}
    _check_alike("rwkv7_keys", {"k": k, "w_delta": w_delta, "a_delta": a_delta}, parameters, head_size)
    if _runs_by_definition(k):
        return reference.rwkv7_keys(k, w_delta, a_delta, w0, a0, k_k, k_a, head_size)
    inputs = [k, w_delta, a_delta, *(x.float() for x in parameters.values())]
    outputs = torch.ops.rwkv_train.rwkv7_keys(*(x.contiguous() for x in inputs), head_size)
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", outputs)


def rwkv7_values(v: Tensor, v_first: Tensor, v_delta: Tensor, v0: Tensor) -> Tensor:
    """RWKV-7's values beyond the first layer: v + σ(v0 + Δv) ⊙ (v_first - v).

    Args:
        v: (B, T, C); likewise v_first and v_delta, in the dtype of v.
        v0: C elements in any shape.

    Returns:
        (B, T, C) in the dtype of v.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_alike("rwkv7_values", {"v": v, "v_first": v_first, "v_delta": v_delta}, {"v0": v0})
    if _runs_by_definition(v):
        return reference.rwkv7_values(v, v_first, v_delta, v0)
    inputs = (v, v_first, v_delta, v0.float())
    return cast(Tensor, torch.ops.rwkv_train.rwkv7_values(*(x.contiguous() for x in inputs)))


def head_norm(
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_size: int,
    eps: float,
    current: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Group norm of each head, plus RWKV-7's term for the current token, times the gate.

        o = (norm(y) ⊙ weight + bias + (Σ_n r k r_k) v) ⊙ gate, the sum over the channels n of a head

    Args:
        y: (B, T, C); likewise gate, in the dtype of y.
        weight: (C); likewise bias.
        head_size: channels of a head.
        eps: added to the variance of a head.
        current: r, k and v, each as y, and r_k, C elements in any shape; None: without that term.

    Returns:
        (B, T, C) in the dtype of y.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    activations, parameters = {"y": y, "gate": gate}, {"weight": weight, "bias": bias}
    if current is not None:
        activations |= dict(zip("rkv", current[:3], strict=True))
        parameters["r_k"] = current[3]
    _check_alike("head_norm", activations, parameters, head_size)
    if _runs_by_definition(y):
        r, k, v, r_k = (None,) * 4 if current is None else current
        return reference.head_norm(y, gate, weight, bias, r, k, v, r_k, head_size, eps)
    inputs = [x.contiguous() for x in (y, gate, weight.float(), bias.float())]
    given = [None] * 4 if current is None else [x.contiguous() for x in (*current[:3], current[3].float())]
    return cast(Tensor, torch.ops.rwkv_train.head_norm(*inputs, *given, head_size, eps))
