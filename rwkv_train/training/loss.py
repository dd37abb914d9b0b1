"""The training loss: cross-entropy, and L2Wrap, which keeps the largest logit of each position from growing."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train.data.rows import IGNORED


class _L2Wrap(torch.autograd.Function):
    """Passes the loss through and adds factor · max logit to the gradient of each position's largest logit.

    The reference code's own version ignores the incoming gradient; here the term scales with it, as gradient
    accumulation and loss scaling need.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, factor: float) -> Tensor:
        largest, where = logits.max(dim=-1, keepdim=True)
        ctx.save_for_backward(largest, where)
        ctx.factor, ctx.shape = factor, logits.shape
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        largest, where = ctx.saved_tensors
        to_logits = largest.new_zeros(ctx.shape)
        to_logits.scatter_(-1, where, largest * (ctx.factor * gradient).to(largest.dtype))
        return gradient, to_logits, None


def language_model_loss(
    logits: Tensor, targets: Tensor, l2wrap: float = 1e-4, predictions: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats per token, with L2Wrap in its gradient.

    Args:
        logits: (B, T, V), any float dtype; the loss is computed in at least float32.
        targets: (B, T) int64; -100 is not predicted.
        l2wrap: weight of ½ · max_logit² · l2wrap / (B·T) per position in the gradient; it is not in the value. 0: none.
            (RWKV-LM's recipe uses 1e-4; B·T counts the masked positions as well.)
        predictions: what the sum over the predicted tokens is divided by; None: their number. With masks it is
            that of the whole step, per pass and device, so that every token counts the same wherever it is.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if predictions is None:
        loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    else:
        summed = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        loss = summed / predictions
    if l2wrap:
        loss = cast(Tensor, _L2Wrap.apply(loss, wide, l2wrap / targets.numel()))  # type: ignore[no-untyped-call]
    return loss


def summed_nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of a validation batch as (sum of nats in float64, number of predicted tokens)."""
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.double().sum(), (targets != IGNORED).sum()
