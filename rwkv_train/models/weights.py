"""Published and own weights: a dict of tensors under the field's names, in a .pth file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_train.errors import UserError
from rwkv_train.json_files import open_regular, reason_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The parameters of a .pth file, under the field's names, mapped from the file.

    Raises:
        UserError: there is no such file, or it does not hold a dict of tensors.
    """
    try:
        weights = load_mapped(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}", "give a .pth file or a checkpoint directory") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as weights: {error}", "copy it again, or give another file") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise UserError(f"{path} does not hold a dict of tensors", "export the weights under the field's names")
    for name, value in weights.items():
        if value.dtype not in _DTYPES or value.layout != torch.strided or not _is_complete(value):
            kind = f"{value.dtype}".removeprefix("torch.") + ("" if _is_complete(value) else ", without its elements")
            raise UserError(
                f"{path}: {name} is not a tensor of weights ({kind})",
                "give weights in float32, float16, bfloat16 or float64; quantised ones cannot be read",
            )
    return weights


def load_mapped(path: Path) -> Any:
    """The content of a file that torch has saved, its tensors mapped from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is torn, no such file, or no regular file.
    """
    try:
        open_regular(path).close()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(reason_of(error)) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types
        torn = not zipfile.is_zipfile(path)
        raise ValueError("it is cut short, or no .pth file" if torn else reason_of(error)) from None


def _is_complete(value: Tensor) -> bool:
    """Whether each element has memory of its own: an expanded tensor can have any size."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


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
    """Raises a UserError that names the first shapes that do not fit; `what` names their origin."""
    different = mismatches(given, model)
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{what} does not fit the model: {'; '.join(different[:3])}{more}", "give weights or a model of one shape"
        )
