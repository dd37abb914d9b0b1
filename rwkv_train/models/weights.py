"""Published and own weights: a dict of tensors under the field's names, in a .pth file."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_train.errors import UserError
from rwkv_train.models.backbone import ModelConfig


def load_weights(path: Path) -> dict[str, Tensor]:
    """The parameters of a .pth file or of a checkpoint directory, under the field's names, on the CPU.

    Raises:
        UserError: there is no such file, or it does not hold a dict of tensors.
    """
    file = path / "weights.pth" if path.is_dir() else path
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        if any(path.glob("weights_*_of_*.pth")):
            raise UserError(
                f"the weights of {path} lie in several files", f"rwkv-train export {path} weights.pth makes one of them"
            ) from None
        raise UserError(f"there is no file {file}", "give a .pth file or a checkpoint directory") from None
    except Exception as error:  # torch raises many types for a file that is torn or no archive of tensors
        reason = str(error).splitlines()[0][:200] if zipfile.is_zipfile(file) else "it is cut short, or no .pth file"
        raise UserError(f"{file} cannot be read as weights: {reason}", "copy it anew, or give another file") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise UserError(f"{file} does not hold a dict of tensors", "export the weights under the field's names")
    return weights


def mismatches(given: Mapping[str, Sequence[int]], model: nn.Module) -> list[str]:
    """How weights of these shapes differ from what the model wants: missing and unknown names, other shapes."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(shape) for name, shape in given.items()}
    missing = [f"{name} is missing" for name in wanted if name not in given]
    unknown = [f"{name} is not in this model" for name in given if name not in wanted]
    shapes = [
        f"{name} has shape {given[name]}, this model {shape}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    return shapes + missing + unknown


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def refuse_mismatches(what: str, given: Mapping[str, Sequence[int]], model: nn.Module) -> None:
    """Raises a UserError that names the first shapes that do not fit; `what` says where they come from."""
    different = mismatches(given, model)
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{what} does not fit the model: {'; '.join(different[:3])}{more}", "give weights or a model of one shape"
        )


def infer_config(weights: Mapping[str, Tensor], what: str = "the dict of weights") -> ModelConfig:
    """The shape of the model that a dict of weights under the field's names belongs to.

    Args:
        weights: name → tensor.
        what: where they come from, for the message.

    Raises:
        UserError: the names are not those of a generation that can be built here.
    """
    for name in ("emb.weight", "blocks.0.ffn.key.weight"):
        if name not in weights or weights[name].dim() != 2:
            held = ", ".join(list(weights)[:2]) or "nothing"
            raise UserError(
                f"{what} does not hold an RWKV model's weights: no matrix {name} (it holds {held}, …)",
                "give weights under the field's names: emb.weight, blocks.0.att.key.weight, …",
            )
    if "blocks.0.att.time_first" not in weights or weights["blocks.0.att.time_first"].dim() != 1:
        raise UserError(
            f"{what} is of a generation that cannot be built here (no blocks.0.att.time_first of one dimension)",
            "known: rwkv4",
        )
    vocab_size, n_embd = weights["emb.weight"].shape
    layers = {int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    width = weights["blocks.0.ffn.key.weight"].shape[0]
    return ModelConfig("rwkv4", max(layers) + 1, n_embd, vocab_size, None if width == 4 * n_embd else width)
