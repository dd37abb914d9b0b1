"""Models: `build_model(ModelConfig(arch="rwkv4", n_layer=12, n_embd=768, vocab_size=65536))`. No Lightning here.

Names are imported at first use, so that `rwkv_train.models.detect` and `.registry` do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rwkv_train.models.config import ModelConfig
from rwkv_train.models.registry import ARCHITECTURES

if TYPE_CHECKING:
    from rwkv_train.models.backbone import LanguageModel
    from rwkv_train.models.build import build_model, recipe_of
    from rwkv_train.models.recipe import RecipeRow
    from rwkv_train.models.state import State

__all__ = [
    "ARCHITECTURES",
    "LanguageModel",
    "ModelConfig",
    "RecipeRow",
    "State",
    "build_model",
    "recipe_of",
]

_MODULES = {
    "LanguageModel": "backbone",
    "RecipeRow": "recipe",
    "State": "state",
    "build_model": "build",
    "recipe_of": "build",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
