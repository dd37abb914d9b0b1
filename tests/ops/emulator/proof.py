"""Runs the CUDA kernels in the emulator, and bounds their errors against the float64 definition.

The bound is the one that docs/kernels.md derives: error ≤ 4 ε · condition. The condition of a result is the sum of the
magnitudes of its terms, each times 1 + M · (1 + age): an exponent of magnitude up to M is rounded once in each of the
`age` steps that it is carried through. A gradient also has the conditions of the denominator and of y in it. Where a
result is stored in 16 bits, half a unit of its last digit is added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv_train.ops import reference
from rwkv_train.ops.registration.wkv4 import CHUNK
from tests.ops.emulator.loader import Buffer, Kernels

EPSILON = torch.finfo(torch.float32).eps
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as kernels.h numbers them
WKV4 = ("y", "new_state", "dw", "du", "dk", "dv", "dstate")


def buffer(kernels: Kernels, name: str, value: Tensor, dtype: torch.dtype = torch.float32) -> Buffer:
    value = value.to(dtype).contiguous()
    return kernels.array(name, value.numpy() if dtype == torch.float32 else value.view(torch.int16).numpy())


def unwritten(kernels: Kernels, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Buffer:
    return kernels.empty(name, shape, "float32" if dtype == torch.float32 else "int16")


def value(content: Buffer, dtype: torch.dtype = torch.float32) -> Tensor:
    raw = torch.from_numpy(content.numpy())
    return (raw if dtype == torch.float32 else raw.view(dtype)).double()


def wkv4(
    kernels: Kernels,
    inputs: list[Tensor],
    gy: Tensor,
    gstate: Tensor | None,
    segments: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The operator and its gradients by the kernels: w, u, k, v, state and the gradients of y and of the new state."""
    w, u, k, v, state = inputs
    (B, T, C), kind = k.shape, DTYPES[dtype]
    saved_states = (T - 1) // CHUNK
    given: list[Any] = [buffer(kernels, "w", w), buffer(kernels, "u", u)]
    given += [buffer(kernels, "k", k, dtype), buffer(kernels, "v", v, dtype), buffer(kernels, "state", state)]
    y = unwritten(kernels, "y", (B, T, C), dtype)
    new_state = unwritten(kernels, "new_state", (B, 3, C))
    saved = unwritten(kernels, "saved", (B, saved_states, 3, C))
    scratch = unwritten(kernels, "scratch", (6 * B * segments * C if segments > 1 else 0,))
    kernels.call("rwkv_wkv4_forward", kind, B, T, C, segments, *given, y, new_state, saved, scratch, None)
    dk, dv = unwritten(kernels, "dk", (B, T, C), dtype), unwritten(kernels, "dv", (B, T, C), dtype)
    dw, du, dstate = (unwritten(kernels, *x) for x in (("dw", (C,)), ("du", (C,)), ("dstate", (B, 3, C))))
    scratch = unwritten(kernels, "scratch", (10 * B * segments * C if segments > 1 else 2 * B * C,))
    of_state = None if gstate is None else buffer(kernels, "gstate", gstate)
    g = buffer(kernels, "gy", gy, dtype)
    kernels.call(
        *("rwkv_wkv4_backward", kind, B, T, C, segments, *given, saved),
        *(g, of_state, dk, dv, dw, du, dstate, scratch, None),
    )
    wide = {"y": y, "dk": dk, "dv": dv}
    narrow = {"new_state": new_state, "dw": dw, "du": du, "dstate": dstate}
    found = {name: value(x, dtype) for name, x in wide.items()} | {name: value(x) for name, x in narrow.items()}
    return {name: found[name] for name in WKV4}


def truth(inputs: list[Tensor], gy: Tensor, gstate: Tensor | None) -> dict[str, Tensor]:
    """The same by the definition in float64."""
    leaves = [x.detach().double().clone().requires_grad_() for x in inputs]
    y, new_state = reference.wkv4(*leaves)
    of_state = torch.zeros_like(new_state) if gstate is None else gstate.double()
    dw, du, dk, dv, dstate = torch.autograd.grad((y, new_state), leaves, (gy.double(), of_state))
    found = {"y": y, "new_state": new_state, "dw": dw, "du": du, "dk": dk, "dv": dv, "dstate": dstate}
    return {name: x.detach() for name, x in found.items()}


def conditions(inputs: list[Tensor], gy: Tensor, gstate: Tensor | None) -> dict[str, Tensor]:
    """What the bound multiplies with 4 ε, for each element of each result. O(T²) memory: for short sequences.

    Weights are those of the average that wkv is: P[t, i] of step i in y_t, Q[t] of the state, R the like of new_state.
    """
    w, u, k, v, state = (x.double() for x in inputs)
    B, T, C = k.shape
    k, v, g = (x.double().permute(0, 2, 1) for x in (k, v, gy))  # (B, C, T)
    n, d, p = state.unbind(1)
    t = torch.arange(T, dtype=torch.float64)
    distance = t[:, None] - t[None, :]  # t - i
    logs = (distance - 1) * w[:, None, None] + k[:, :, None, :]  # (B, C, t, i)
    logs = torch.where(distance == 0, (u[:, None] + k)[..., None, :], logs).masked_fill(distance < 0, -torch.inf)
    state_logs = p[..., None] + t * w[:, None]  # (B, C, t)
    top = torch.maximum(logs.amax(-1), state_logs)
    weights, past = (logs - top[..., None]).exp(), (state_logs - top).exp()
    total = weights.sum(-1) + d[..., None] * past
    P, Q = weights / total[..., None], past / total
    ends = (T - 1 - t) * w[:, None] + k  # exponents of new_state
    end_of_state = p + T * w
    last = torch.maximum(ends.amax(-1), end_of_state)
    R, R_state = (ends - last[..., None]).exp(), (end_of_state - last).exp()
    # The largest exponent of a channel that anything depends on: running maxima, k, u + k and w.
    running = torch.where(distance > 0, logs, -torch.inf).amax(-1)[..., 1:]
    running = torch.maximum(running, state_logs[..., 1:])
    magnitudes = [running.abs().amax(-1)] if T > 1 else []
    magnitudes += [k.abs().amax(-1), (u[:, None] + k).abs().amax(-1), w.abs().expand(B, C), last.abs()]
    magnitudes.append(torch.where(p > -1e30, p.abs(), 0))
    M = torch.stack(magnitudes).amax(0)[..., None, None]  # (B, C, 1, 1)
    E, E_state = 1 + M * (1 + distance.clamp(min=0)), (1 + M[..., 0] * (2 + t))
    # new_state is relative to its maximum, which was rounded in every step since it was set.
    since = torch.where(ends.amax(-1) >= end_of_state, T - ends.argmax(-1), T + 1)
    E_end, E_state_end = 1 + M[..., 0] * (T - t + since[..., None]), 1 + M[..., 0, 0] * (T + 1 + since)
    Y = (P * v.abs()[:, :, None, :]).sum(-1) + Q * n.abs()[..., None]  # Σ of magnitudes, (B, C, t)
    G = g.abs()
    spread = v.abs()[:, :, None, :] + Y[..., None]
    state_spread = n.abs()[..., None] + d.abs()[..., None] * Y
    y = (P * E * spread).sum(-1) + Q * E_state * state_spread
    divided = (P * E).sum(-1) + Q * E_state * d.abs()[..., None]  # of 1 / denominator, (B, C, t)
    terms = P * G[..., None] * (E + divided[..., None])
    to_k = terms * spread + P * (G * y)[..., None]
    state_terms = Q * G * (E_state + divided)
    to_state = state_terms * state_spread + Q * G * d.abs()[..., None] * y
    ages, state_ages = (distance - 1).clamp(min=0), t
    found = {
        "y": y,
        "dv": terms.sum(-2),
        "dk": to_k.sum(-2),
        "du": to_k.diagonal(dim1=-2, dim2=-1).sum((0, 2)),
        "dw": (ages * to_k).sum((0, 2, 3)) + (state_ages * to_state).sum((0, 2)),
    }
    N_end, D_end = (R * v.abs()).sum(-1) + R_state * n.abs(), R.sum(-1) + R_state * d.abs()
    found["new_state"] = torch.stack(
        (
            (R * E_end * v.abs()).sum(-1) + R_state * E_state_end * n.abs(),
            (R * E_end).sum(-1) + R_state * E_state_end * d.abs(),
            last.abs() + M[..., 0, 0] * since,
        ),
        1,
    )
    dstate = [state_terms.sum(-1), (state_terms * Y + Q * G * y).sum(-1), to_state.sum(-1)]
    if gstate is not None:
        gn, gd, gp = (x.abs()[..., None] for x in gstate.double().unbind(1))
        through = R * E_end * (v.abs() * gn + gd)
        q = gp + N_end[..., None] * gn + D_end[..., None] * gd  # of new_state's maximum
        won = (ends == last[..., None]) * q * E_end
        found["dv"] = found["dv"] + R * E_end * gn
        found["dk"] = found["dk"] + through + won
        state_won = ((end_of_state == last) * q[..., 0]) * E_state_end
        through_state = R_state * E_state_end * (n.abs() * gn[..., 0] + d.abs() * gd[..., 0])
        after = (T - 1 - t) * (through + won)
        found["dw"] = found["dw"] + (after.sum(-1) + T * (through_state + state_won)).sum(0)
        dstate[0] = dstate[0] + R_state * E_state_end * gn[..., 0]
        dstate[1] = dstate[1] + R_state * E_state_end * gd[..., 0]
        dstate[2] = dstate[2] + through_state + state_won
    found["dstate"] = torch.stack(dstate, 1)
    for name in ("y", "dv", "dk"):
        found[name] = found[name].permute(0, 2, 1)
    return found


def worst(
    found: dict[str, Tensor], exact: dict[str, Tensor], condition: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """Largest error of each result in units of ε · condition, after half a unit of the last digit where it is stored
    in 16 bits, and what is lost where each of T terms is flushed to 0. NaN, which is no `<= 4`, where a result is NaN.
    """
    ratios, flushed = {}, 8 * found["y"].shape[1] * torch.finfo(torch.float32).tiny
    for name, ours in found.items():
        error = ((ours - exact[name]).abs() - flushed).clamp(min=0)
        if dtype != torch.float32 and name in ("y", "dk", "dv"):
            kind = torch.finfo(dtype)
            rounding = kind.eps / 2 * exact[name].abs() * (1 + EPSILON) + kind.smallest_normal * kind.eps / 2
            error = (error - rounding).clamp(min=0)
        ratios[name] = (error / (EPSILON * condition[name]).clamp(min=flushed)).max().item()
    return ratios
