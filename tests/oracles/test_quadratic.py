"""The complete time mix against the paper's sum over all pairs of positions, in float64: no recurrence, no maximum."""

import pytest
import torch
from torch import Tensor

from rwkv_train import ops


def quadratic_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Equation (16) of the paper as it is written, over all i ≤ t: w, u (C), k, v (B, T, C) → (B, T, C)."""
    length = k.shape[1]
    t = torch.arange(length, dtype=k.dtype)
    distance = (t[:, None] - 1 - t[None, :]).clamp_min(0)[..., None] * w  # (T, T, C)
    exponent = distance[None] + k[:, None]  # (B, t, i, C)
    exponent = torch.where(torch.eye(length, dtype=torch.bool)[None, :, :, None], u + k[:, None], exponent)
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, :, :, None]
    weight = torch.where(causal, exponent, -torch.inf).softmax(dim=2)
    return (weight * v[:, None]).sum(2)


@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 1, 1), (2, 2, 5), (2, 33, 12), (1, 100, 9)])
def test_wkv4_is_the_papers_sum(batch: int, length: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    w, u = (-torch.exp(draw(channels).detach())).requires_grad_(), draw(channels)
    k, v = draw(batch, length, channels), draw(batch, length, channels)
    ours, _ = ops.wkv4(w, u, k, v)
    exact = quadratic_wkv(w, u, k, v)
    assert (ours - exact).abs().max() < 1e-12
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for mine, truth in zip(
        torch.autograd.grad((ours * weight).sum(), (w, u, k, v), materialize_grads=True),
        torch.autograd.grad((exact * weight).sum(), (w, u, k, v), materialize_grads=True),
        strict=True,
    ):
        assert (mine - truth).abs().max() <= 1e-12 * max(1.0, float(truth.abs().max()))
