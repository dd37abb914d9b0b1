"""Parameters that the loss does not depend on are frozen before training, under every strategy alike.

DDP would wait for their gradient, ZeRO would apply weight decay to them, and a plain optimiser would not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv_train.models.backbone import LanguageModel

PROBE_TOKENS = 2  # of the forward pass that is examined: T > 1, as in training


def freeze_unused(model: LanguageModel) -> list[str]:
    """Freezes the trainable parameters that no gradient of the logits reaches.

    Architectures declare such parameters (`RecipeRow.not_trained`), so that nothing is left to do here. It is for
    models that a callback has changed.

    Args:
        model: on any device, the meta device included; its values do not matter.

    Returns:
        the names of the parameters that were frozen.
    """
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device=model.emb.weight.device)
    with torch.enable_grad():
        logits, _ = model(tokens)
    used = _leaves(logits)
    unused = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in used}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    return [*unused]


def _leaves(output: Tensor) -> set[int]:
    """The ids of the tensors in whose `.grad` a backward pass from this output would accumulate."""
    leaves: set[int] = set()
    seen: set[Any] = set()
    nodes: list[Any] = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return leaves
