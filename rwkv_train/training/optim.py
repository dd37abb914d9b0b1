"""The optimiser: parameter groups from the generation's recipe, and the learning rate as a function of the tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rwkv_train.config import GroupRule, OptimSettings
from rwkv_train.errors import UserError
from rwkv_train.models import RecipeRow


def parameter_groups(
    model: nn.Module, recipe: Mapping[str, RecipeRow], weight_decay: float, rules: Sequence[GroupRule] = ()
) -> list[dict[str, Any]]:
    """Groups the trainable parameters by (learning-rate multiplier, weight decay), each in exactly one.

    Args:
        model: its named parameters are grouped; those with requires_grad=False are left out.
        recipe: each parameter's row, by name.
        weight_decay: the value for rows that decay; the others get 0.
        rules: overrides; of several that match a name, the last one counts.

    Returns:
        groups for a torch optimiser: `params` as (name, parameter) pairs, `lr_multiplier`, `weight_decay`.

    Raises:
        UserError: a rule that matches no trainable parameter, or a model without any.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError("no parameter of the model is trainable", "leave at least one with requires_grad=True")
    example = _pattern_of(max(trainable, key=lambda name: recipe[name].lr))
    for rule in rules:
        if not any(re.fullmatch(rule.pattern, name) for name in recipe):
            raise UserError(f"optim.rules: the pattern {rule.pattern!r} matches no parameter", f"e.g. {example}")
        if not any(re.fullmatch(rule.pattern, name) for name in trainable):
            raise UserError(
                f"optim.rules: the pattern {rule.pattern!r} matches only parameters that are not trained",
                f"remove the rule, or name trainable ones, e.g. {example}",
            )
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in trainable.items():
        multiplier, decay = recipe[name].lr, recipe[name].decay
        for rule in rules:
            if re.fullmatch(rule.pattern, name):
                multiplier = multiplier if rule.lr is None else rule.lr
                decay = decay if rule.weight_decay is None else rule.weight_decay
        groups.setdefault((multiplier, weight_decay if decay else 0.0), []).append((name, parameter))
    return [
        {"params": members, "lr_multiplier": multiplier, "weight_decay": decay}
        for (multiplier, decay), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def _pattern_of(name: str) -> str:
    """A pattern that matches a parameter, in every block that has it: blocks.0.ffn.key.weight → .*ffn.key.weight."""
    return ".*" + name.split(".", 2)[2] if name.startswith("blocks.") else name


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each group: learning-rate multiplier, weight decay, number of tensors and values, kinds of names."""
    return [
        f"lr ×{group['lr_multiplier']:g}, weight decay {group['weight_decay']:g}: {_summary(group['params'])}"
        for group in groups
    ]


def describe_frozen(model: nn.Module) -> list[str]:
    """One line about the parameters that are not trained, in the form of `describe_groups`; none where all are."""
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return [f"not trained: {_summary(frozen)}"] if frozen else []


def _summary(members: Sequence[tuple[str, nn.Parameter]]) -> str:
    kinds = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name, _ in members})
    values = sum(parameter.numel() for _, parameter in members)
    shown = ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more kinds" if len(kinds) > 4 else "")
    return f"{len(members)} tensors, {values:,} values ({shown})"


def build_optimizer(groups: list[dict[str, Any]], optim: OptimSettings) -> torch.optim.AdamW:
    """Fused AdamW (Adam where weight decay is 0). The module sets the learning rates before each step."""
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def learning_rate(optim: OptimSettings, tokens: int, last: int | None, tokens_per_step: int) -> float:
    """The base learning rate of an optimiser step: a pure function of its arguments.

    It rises linearly from 1 % (factor 0.01 + 0.99 · step / warm-up, as in the reference code), stays constant for
    `hold`, and decays to final_lr at the last step, in the shape of the schedule.

    Args:
        tokens: trained on before the step.
        last: tokens trained on before the last step; None (a run without end) is valid for the constant shape only.
        tokens_per_step: of the batch with which the run began: converts spans that are given in steps, and spans in
            tokens are rounded up to such steps.
    """
    schedule = optim.schedule
    step = tokens / tokens_per_step
    warmup = schedule.warmup.in_steps(tokens_per_step)
    if step < warmup:
        return optim.lr * (0.01 + 0.99 * step / warmup)
    if schedule.shape == "constant":
        return optim.lr
    assert last is not None, "a schedule that decays needs the length of the run"
    start = warmup + schedule.hold.in_steps(tokens_per_step)
    progress = min(max((step - start) / max(last / tokens_per_step - start, 1), 0.0), 1.0)
    if schedule.shape == "exponential":
        return float(optim.lr * (optim.final_lr / optim.lr) ** progress)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
