"""What a model gives to the tokens that came: their cost in nats, and whether each was the likeliest."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train.config import LOGITS_AT_ONCE
from rwkv_train.data.rows import IGNORED
from rwkv_train.models import LanguageModel, State


class Scores(NamedTuple):
    """Of each target, 0 and True where there is none."""

    nats: Tensor  # (B, T) float32
    greedy: Tensor  # (B, T) bool, whether the target is the likeliest token


@torch.inference_mode()
def score(
    model: LanguageModel, tokens: Tensor, targets: Tensor, state: State | None = None, starts: Tensor | None = None
) -> tuple[Scores, State]:
    """Reads tokens and scores what follows each; logits exist for the targets alone, and not for all of them at once.

    Args:
        tokens: (B, T) int64, on the model's device.
        targets: (B, T) int64; -100 is not scored.
        state: what was read before.
        starts: (B, T) bool, where a fresh text begins.

    Returns:
        the scores, and the state after the last token.
    """
    nats = torch.zeros(tokens.shape, device=tokens.device)
    greedy = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    wanted = targets != IGNORED

    def readout(hidden: Tensor, weight: Tensor) -> Tensor:
        rows, goals = hidden[wanted], targets[wanted]  # (N, C), (N)
        size = max(1, LOGITS_AT_ONCE // len(weight))
        parts = [
            (F.linear(part, weight).float(), goal)
            for part, goal in zip(rows.split(size), goals.split(size), strict=True)
        ]
        if len(goals):
            nats[wanted] = torch.cat([F.cross_entropy(logits, goal, reduction="none") for logits, goal in parts])
            greedy[wanted] = torch.cat([logits.argmax(-1) == goal for logits, goal in parts])
        return hidden

    _, after = model(tokens, state, starts, readout)
    return Scores(nats, greedy), after
