"""The definition of every operator in plain PyTorch: any float dtype, autograd, any device.

Engines are tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EMPTY_MAXIMUM = -1e38  # running maximum of the empty state: e^(it - any exponent) is 0 in float32 and float64


def initial_state(k: Tensor) -> Tensor:
    """The wkv state before the first token: (0, 0, -1e38) for k (B, T, C) → (B, 3, C), float32 (float64 when k is)."""
    state = k.new_zeros(k.shape[0], 3, k.shape[2], dtype=accumulator(k))
    state[:, 2] = EMPTY_MAXIMUM
    return state


def accumulator(k: Tensor) -> torch.dtype:
    """The dtype of the recurrence: float64 for float64 inputs, else float32."""
    return torch.float64 if k.dtype == torch.float64 else torch.float32


def wkv4(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RWKV-4's weighted average of the past values (arXiv 2305.13048, equation 14 and appendix D).

        wkv_t = (Σ_{i<t} e^{(t-1-i)w + k_i} v_i + e^{u+k_t} v_t) / (Σ_{i<t} e^{(t-1-i)w + k_i} + e^{u+k_t})

    Both sums are carried divided by e^p, where p is the largest exponent so far: nothing overflows.

    Args:
        w: (C) decay per step, negative.
        u: (C) bonus of the current token.
        k: (B, T, C).
        v: (B, T, C).
        state: (B, 3, C) numerator, denominator and running maximum p before the first token.
        starts: (B, T) bool, true at the first token of each document: the state before it is the empty one.

    Returns:
        wkv (B, T, C) in the dtype of k, and the state after the last token in the dtype of the recurrence.
    """
    dtype = accumulator(k)
    w, u = w.to(dtype), u.to(dtype)
    num, den, p = state.to(dtype).unbind(1)  # each (B, C)
    outputs = []
    for t, (k_t, v_t) in enumerate(zip(k.to(dtype).unbind(1), v.to(dtype).unbind(1), strict=True)):
        if starts is not None:
            first = starts[:, t, None]
            num, den, p = num.masked_fill(first, 0), den.masked_fill(first, 0), p.masked_fill(first, EMPTY_MAXIMUM)
        top = torch.maximum(p, u + k_t)
        past, now = torch.exp(p - top), torch.exp(u + k_t - top)
        outputs.append((past * num + now * v_t) / (past * den + now))

        top = torch.maximum(p + w, k_t)
        past, now = torch.exp(p + w - top), torch.exp(k_t - top)
        num, den, p = past * num + now * v_t, past * den + now, top
    return torch.stack(outputs, 1).to(k.dtype), torch.stack((num, den, p), 1)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's generalised delta rule (arXiv 2503.14456), token by token.

        S_t = S_{t-1} diag(e^{w_t}) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ,  y_t = S_t r_t

    Args:
        r: (B, T, H, N); likewise k, v, a, b.
        w: (B, T, H, N) logarithm of the decay, ≤ 0.
        state: (B, H, N, N) S before the first token, indexed [value, key].
        starts: (B, T) bool, true at the first token of each document: the state before it is zero.

    Returns:
        y (B, T, H, N) in the dtype of r, and the state after the last token in the dtype of the recurrence.
    """
    dtype = accumulator(r)
    state = state.to(dtype)
    outputs = []
    steps = zip(*(x.to(dtype).unbind(1) for x in (r, w, k, v, a, b)), strict=True)
    for t, (r_t, w_t, k_t, v_t, a_t, b_t) in enumerate(steps):  # each (B, H, N)
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        # sums of products, not matrix products, which autocast would compute in bfloat16
        along_a = (state * a_t.unsqueeze(-2)).sum(-1, keepdim=True)
        state = (
            state * torch.exp(w_t).unsqueeze(-2) + along_a * b_t.unsqueeze(-2) + v_t.unsqueeze(-1) * k_t.unsqueeze(-2)
        )
        outputs.append((state * r_t.unsqueeze(-2)).sum(-1))
    return torch.stack(outputs, 1).to(r.dtype), state


def token_shift(x: Tensor, previous: Tensor | None, starts: Tensor | None = None) -> Tensor:
    """x_{t-1} for every t: x (B, T, C), previous (B, C) the row before the first (None: zeros) → (B, T, C).

    Where `starts` (B, T) is true a document begins: the row before it counts as zeros.
    """
    first = torch.zeros_like(x[:, :1]) if previous is None else previous.to(x.dtype).unsqueeze(1)
    shifted = torch.cat((first, x[:, :-1]), 1)
    return shifted if starts is None else shifted.masked_fill(starts.unsqueeze(2), 0)


def shift_mix(
    x: Tensor, previous: Tensor | None, mixes: Sequence[Tensor], starts: Tensor | None = None
) -> list[Tensor]:
    """x_t · μ + x_{t-1} · (1 - μ) for each μ of `mixes` (C elements each): x (B, T, C) → one (B, T, C) per μ."""
    shifted = token_shift(x, previous, starts)
    return [torch.lerp(shifted, x, mix.to(x.dtype).view(1, 1, -1)) for mix in mixes]


def relu_squared(k: Tensor) -> Tensor:
    """relu(k)², any shape."""
    return torch.relu(k).square()


def sigmoid_gate(r: Tensor, y: Tensor) -> Tensor:
    """σ(r) ⊙ y, both of one shape."""
    return torch.sigmoid(r) * y
