"""Models: `build_model(ModelConfig(arch="rwkv4", n_layer=12, n_embd=768, vocab_size=65536))`. No Lightning here."""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from rwkv_train.models import rwkv4
from rwkv_train.models.backbone import Generation, LanguageModel, LayerState, ModelConfig, State
from rwkv_train.models.recipe import RecipeRow, claim, initialise

__all__ = [
    "ARCHITECTURES",
    "LanguageModel",
    "LayerState",
    "ModelConfig",
    "RecipeRow",
    "State",
    "build_model",
    "recipe_of",
]

ARCHITECTURES: dict[str, ModuleType] = {"rwkv4": rwkv4}


def _generation(config: ModelConfig) -> Generation:
    if config.arch not in ARCHITECTURES:
        raise ValueError(f"arch is {config.arch!r}; valid: {', '.join(ARCHITECTURES)}")
    return cast(Generation, ARCHITECTURES[config.arch])


def build_model(config: ModelConfig, seed: int = 0, device: str | torch.device = "cpu") -> LanguageModel:
    """Builds a model in float32 with the generation's initial weights.

    Args:
        config: its shape.
        seed: the weights are a function of (seed, parameter name, shape) only.
        device: where it is made; "meta" makes the shapes and no values.

    Raises:
        ValueError: an unknown architecture or a size that is not positive.
    """
    generation = _generation(config)
    for name in ("n_layer", "n_embd", "vocab_size", "dim_ffn"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    with torch.device("meta"), _NoValues():
        model = LanguageModel(generation, config)
    rows = recipe_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rows[name].trained)
    if torch.device(device).type != "meta":
        model = model.to_empty(device=device)
        initialise(model, generation.RECIPE, config.n_layer, seed)
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
    return claim((name for name, _ in model.named_parameters()), _generation(model.config).RECIPE)
