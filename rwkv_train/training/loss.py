"""The training loss: cross-entropy, and L2Wrap, which keeps the largest logit of each position from growing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train.config import LOGITS_AT_ONCE
from rwkv_train.data.rows import IGNORED_TARGET


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
        predictions: () float32, what the sum over the predicted tokens is divided by; None: their number. With masks it
            is `Batch.predictions`, so that every token of a step has the same weight, in whichever micro-batch it is.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if predictions is None:
        loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)
    else:
        summed = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
        loss = summed / predictions
    if l2wrap:
        loss = cast(Tensor, _L2Wrap.apply(loss, wide, l2wrap / targets.numel()))  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """The same loss from hidden states: head, cross-entropy and both gradients, some rows at a time.

    The gradients are computed in the forward pass, while the logits of a chunk exist; the backward pass scales them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: float, predictions: Tensor | None
    ) -> Tensor:
        rows, goals = hidden.flatten(0, 1), targets.flatten()  # (B T, C), (B T)
        counted = (goals != IGNORED_TARGET).sum() if predictions is None else predictions
        to_hidden = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part, goal, span in _chunks(rows, goals, weight.shape[0]):
            logits = F.linear(part, weight)
            wide = logits.float()
            total += F.cross_entropy(wide, goal, ignore_index=IGNORED_TARGET, reduction="sum")
            if to_hidden is None and to_weight is None:
                continue
            largest, where = wide.max(-1, keepdim=True)
            slope = torch.softmax(wide, -1)  # (rows, V), becomes the gradient of the logits
            predicted = (goal != IGNORED_TARGET).unsqueeze(-1)
            slope.scatter_add_(-1, goal.clamp(min=0).unsqueeze(-1), -torch.ones_like(largest))
            slope *= predicted / counted
            slope.scatter_add_(-1, where, largest * (l2wrap / goals.numel()))
            narrow = slope.to(logits.dtype)
            if to_hidden is not None:
                to_hidden[span] = narrow @ weight.to(narrow.dtype)
            if to_weight is not None:
                to_weight += narrow.t() @ part.to(narrow.dtype)
        ctx.to_hidden = None if to_hidden is None else to_hidden.view_as(hidden)
        ctx.to_weight = to_weight
        return total / counted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,) = gradients
        scaled = [None if made is None else made.mul_(gradient) for made in (ctx.to_hidden, ctx.to_weight)]
        ctx.to_hidden = ctx.to_weight = None
        return scaled[0], scaled[1], None, None, None


def _chunks(rows: Tensor, goals: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Rows (N, C) and their targets (N) in chunks of at most LOGITS_AT_ONCE logits, each with its range of rows."""
    size = max(1, LOGITS_AT_ONCE // vocab_size)
    for first in range(0, len(rows), size):
        span = slice(first, min(first + size, len(rows)))
        yield rows[span], goals[span], span


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: float = 1e-4, predictions: Tensor | None = None
) -> Tensor:
    """`language_model_loss` of the logits hidden · weightᵀ, of which only a chunk exists at a time; equal to rounding.

    Args:
        hidden: (B, T, C), the input of the head.
        weight: (V, C), of the head.
        targets: (B, T) int64; -100 is not predicted.
        l2wrap, predictions: as in `language_model_loss`.
    """
    return cast(Tensor, _ChunkedLoss.apply(hidden, weight, targets, l2wrap, predictions))  # type: ignore[no-untyped-call]


def too_many_logits(targets: Tensor, vocab_size: int) -> bool:
    """Whether the logits of a batch are computed in chunks."""
    return targets.numel() * vocab_size > LOGITS_AT_ONCE


def summed_nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of a validation batch as (sum of nats in float64, number of predicted tokens)."""
    nats = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="none"
    )
    return nats.double().sum(), (targets != IGNORED_TARGET).sum()


def predicted_text(targets: Tensor, token_bytes: Tensor) -> Tensor:
    """Number of predicted tokens of a batch and bytes of their text, float64 (2,).

    Args:
        targets: (B, T) int64; -100 is not predicted.
        token_bytes: (V,) int64, bytes of each token (`rwkv_train.data.bits_per_byte.token_bytes`), on the same device.
    """
    predicted = targets != IGNORED_TARGET
    text_bytes = token_bytes[targets.clamp(min=0)] * predicted
    return torch.stack([predicted.sum(), text_bytes.sum()]).double()


def head_nats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of nats of `summed_nats`, from hidden states (B, T, C) and the head's weight (V, C), in chunks."""
    chunks = _chunks(hidden.flatten(0, 1), targets.flatten(), weight.shape[0])
    parts = [summed_nats(F.linear(part, weight).unsqueeze(0), goal.unsqueeze(0))[0] for part, goal, _ in chunks]
    return torch.stack(parts).sum()
