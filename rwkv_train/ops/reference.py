"""The definition of every operator in plain PyTorch: any float dtype, autograd, any device.

Engines are tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_DECAY = -math.exp(-0.5)  # RWKV-7: the logarithm of its fastest decay; e^{LOG_DECAY · σ(…)} is in (0.545, 1)
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


def rwkv7_keys(
    k: Tensor, w_delta: Tensor, a_delta: Tensor, w0: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, head_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What RWKV-7's recurrence takes beside r and v (arXiv 2503.14456, section 4), in the dtype of the recurrence.

    With α = σ(a0 + Δa), the in-context learning rate, and κ = k ⊙ k_k divided by its norm in each head:
    w = LOG_DECAY · σ(w0 + Δw), the logarithm of the decay; k ⊙ (1 + (α - 1) ⊙ k_a); a = -κ; b = κ ⊙ α.

    Args:
        k: (B, T, C); likewise w_delta and a_delta.
        w0: C elements; likewise a0, k_k and k_a.
        head_size: channels of a head.

    Returns:
        w in the dtype of the recurrence; k, a and b in that of k; all (B, T, C).
    """
    dtype = accumulator(k)
    key, w_delta, a_delta = k.to(dtype), w_delta.to(dtype), a_delta.to(dtype)
    w0, a0, k_k, k_a = (x.to(dtype).flatten() for x in (w0, a0, k_k, k_a))
    rate = torch.sigmoid(a0 + a_delta)
    kappa = F.normalize((key * k_k).unflatten(-1, (-1, head_size)), dim=-1).flatten(-2)
    w, new_k = LOG_DECAY * torch.sigmoid(w0 + w_delta), key * (1 + (rate - 1) * k_a)
    return w, new_k.to(k.dtype), (-kappa).to(k.dtype), (kappa * rate).to(k.dtype)


def rwkv7_values(v: Tensor, v_first: Tensor, v_delta: Tensor, v0: Tensor) -> Tensor:
    """v + σ(v0 + Δv) ⊙ (v_first - v): (B, T, C) each, v0 C elements → (B, T, C) in the dtype of v."""
    dtype = accumulator(v)
    nearness = torch.sigmoid(v0.to(dtype).flatten() + v_delta.to(dtype))
    value = v.to(dtype)
    return (value + nearness * (v_first.to(dtype) - value)).to(v.dtype)


def head_norm(
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    r_k: Tensor | None,
    head_size: int,
    eps: float,
) -> Tensor:
    """Group norm of each head, plus RWKV-7's term for the current token, times the gate.

        o = (norm(y) ⊙ weight + bias + (Σ_n r k r_k) v) ⊙ gate, the sum over the channels n of a head

    Args:
        y: (B, T, C); likewise gate and, where they are given, r, k and v.
        weight: (C); likewise bias.
        r_k: C elements; r, k, v and r_k are None for a norm without that term.
        head_size: channels of a head.
        eps: added to the variance.

    Returns:
        (B, T, C) in the dtype of y.
    """
    dtype = accumulator(y)

    def by_head(x: Tensor) -> Tensor:
        return x.to(dtype).view(*x.shape[:-1], -1, head_size)

    heads = by_head(y)
    centred = heads - heads.mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    out = normal.flatten(-2) * weight.to(dtype) + bias.to(dtype)
    if r is not None and k is not None and v is not None and r_k is not None:
        current = (by_head(r) * by_head(k) * by_head(r_k.flatten())).sum(-1, keepdim=True)
        out = out + (current * by_head(v)).flatten(-2)
    return (out * gate.to(dtype)).to(y.dtype)
