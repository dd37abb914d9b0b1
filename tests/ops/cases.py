"""Inputs for the operators and the bounds of their errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Operator = Callable[..., Sequence[Tensor]]


def wkv4_inputs(B: int, T: int, C: int, k_scale: float = 2.0, decay: float = 0.0, seed: int = 0) -> list[Tensor]:
    """w, u, k, v, state in float64 (but exact in float32): decay is the mean of ln(-w)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    state = torch.stack((draw(B, C), draw(B, C).exp(), draw(B, C)), 1)
    inputs = [-torch.exp(decay + draw(C)), draw(C), k_scale * draw(B, T, C), draw(B, T, C), state]
    return [x.double() for x in inputs]


def wkv7_inputs(B: int, T: int, H: int, N: int, decay: float = -1.0, seed: int = 0) -> list[Tensor]:
    """r, w, k, v, a, b, state in float64 (but exact in float32), a and b as in RWKV-7; decay is the mean of ln(-w)."""
    generator = torch.Generator().manual_seed(seed)
    r, w, k, v, a, b = (torch.randn(B, T, H, N, generator=generator) for _ in range(6))
    a = torch.nn.functional.normalize(a, dim=-1)
    state = torch.randn(B, H, N, N, generator=generator)
    return [x.double() for x in (r, -torch.exp(decay + w), k, v, a, -a * torch.sigmoid(b), state)]


def value_and_gradients(operator: Operator, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Outputs, and the gradient of a fixed weighted sum of all of them for every input, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)]
    outputs = operator(*leaves)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return [x.detach().double() for x in (*outputs, *torch.autograd.grad(outputs, leaves, weights))]


def assert_as_good_as(
    ours: Sequence[Tensor], definition: Sequence[Tensor], truth: Sequence[Tensor], outputs: int, epsilon: float
) -> None:
    """Error of ours against the float64 truth ≤ 2 × the definition's in the working dtype (gradients 3 ×).

    Where the definition is nearly exact by chance, one rounding of the result (epsilon) counts as its error.
    """
    for index, (mine, plain, exact) in enumerate(zip(ours, definition, truth, strict=True)):
        assert mine.isfinite().all(), f"result {index} is not finite"
        reference = max((plain - exact).norm().item(), epsilon * exact.norm().item())
        error, factor = (mine - exact).norm().item(), 2 if index < outputs else 3
        assert error <= factor * reference, f"result {index}: error {error:.3g}, the definition's {reference:.3g}"
