"""Scores of given tokens under a model: their loss in nats, and whether greedy decoding would choose them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train.config import LOGITS_AT_ONCE
from rwkv_train.data.rows import IGNORED_TARGET
from rwkv_train.models import LanguageModel, State


class TokenScores(NamedTuple):
    """Scores of the targets.

    Attributes:
        nats: negative log-probability of each target, 0 where there is none; float32 (B, T).
        greedy: whether the target is the most likely token, True where there is none; bool (B, T).
    """

    nats: Tensor
    greedy: Tensor


@torch.inference_mode()
def score(
    model: LanguageModel, tokens: Tensor, targets: Tensor, state: State | None = None, starts: Tensor | None = None
) -> tuple[TokenScores, State]:
    """Reads tokens and scores the target of each. Logits are computed for targets only, and in parts.

    Args:
        tokens: input tokens, int64 (B, T), on the model's device.
        targets: tokens to score, int64 (B, T), on the same device; -100 is not scored.
        state: state after the tokens read before; None: of a new text.
        starts: whether a new text starts at each token, bool (B, T); None: nowhere.

    Returns:
        The scores, and the state after the last token.
    """
    nats = torch.zeros(tokens.shape, device=tokens.device)
    greedy = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    scored = targets != IGNORED_TARGET

    def readout(hidden: Tensor, weight: Tensor) -> Tensor:
        rows, goals = hidden[scored], targets[scored]  # (N, C), (N,)
        size = max(1, LOGITS_AT_ONCE // len(weight))
        parts = [
            (F.linear(part, weight).float(), goal)
            for part, goal in zip(rows.split(size), goals.split(size), strict=True)
        ]
        if len(goals):
            nats[scored] = torch.cat([F.cross_entropy(logits, goal, reduction="none") for logits, goal in parts])
            greedy[scored] = torch.cat([logits.argmax(-1) == goal for logits, goal in parts])
        return hidden

    _, final = model(tokens, state, starts, readout)
    return TokenScores(nats, greedy), final
