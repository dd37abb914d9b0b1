"""From a ModelConfig to a model with initial weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rwkv_train.models.backbone import LanguageModel
from rwkv_train.models.config import ModelConfig
from rwkv_train.models.recipe import RecipeRow, claim, initialise
from rwkv_train.models.registry import architecture


def build_model(config: ModelConfig, seed: int = 0, device: str | torch.device = "cpu") -> LanguageModel:
    """Builds a model in float32 with the architecture's initial weights.

    Args:
        config: its shape; None means the architecture's default.
        seed: the weights are a function of (seed, parameter name, shape) only.
        device: where it is made; "meta" makes the shapes and no values.

    Raises:
        ValueError: an unknown architecture, a size that is not positive, or one that the architecture does not know.
    """
    arch = architecture(config.arch)
    config = arch.complete(config)
    with torch.device("meta"), _NoValues():
        model = LanguageModel(config)
    rows = recipe_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rows[name].trains(name))
    if torch.device(device).type != "meta":
        model = model.to_empty(device=device)
        initialise(model, arch.recipe, config, seed)
    return model


class _NoValues(TorchFunctionMode):
    """Layers are made without values of their own: the recipe gives them.

    On the meta device torch's own initialisation would import its compiler, more than a second for nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def recipe_of(model: LanguageModel) -> dict[str, RecipeRow]:
    """Each parameter's row of the recipe (initialisation, learning-rate multiplier, weight decay), by name."""
    return claim((name for name, _ in model.named_parameters()), model.architecture.recipe)
