"""Published and own weights: a dict of tensors under the field's names, in a .pth or .safetensors file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_train.errors import UserError
from rwkv_train.json_files import open_regular, reason_of
from rwkv_train.models.detect import is_legacy, is_safetensors
from rwkv_train.models.state_dict import unwrapped
from rwkv_train.user_path import is_utf8

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class LoadedWeights(NamedTuple):
    """The parameters of a file.

    Attributes:
        tensors: by the field's names.
        mapped: whether they are mapped from the file; else they are in memory.
        note: what was removed from the names, for a line of output; empty: nothing.
    """

    tensors: dict[str, Tensor]
    mapped: bool
    note: str


def load_weights(path: Path) -> LoadedWeights:
    """The parameters of a .pth or .safetensors file, under the field's names.

    A .pth file is mapped; one of torch's format before 1.6 and a .safetensors file are read into memory.

    Raises:
        UserError: there is no such file, it does not hold the tensors of one model, or safetensors is not installed.
    """
    try:
        content, mapped = (_load_safetensors(path), False) if is_safetensors(path) else _load_pth(path)
        weights, note = unwrapped(content, lambda value: isinstance(value, Tensor))
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
    return LoadedWeights(weights, mapped, note)


def _load_pth(path: Path) -> tuple[Any, bool]:
    """The content of a .pth file, and whether it is mapped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or something else.
    """
    _check_regular(path)
    if not is_legacy(path):
        return load_mapped(path), True
    try:
        return torch.load(path, map_location="cpu", weights_only=True), False
    except Exception as error:  # torch raises many types
        raise ValueError(reason_of(error)) from None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, in memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or something else.
        UserError: the library is not installed.
    """
    _check_regular(path)
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: the package safetensors is not installed", "pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:  # its own type, and those of torch
        raise ValueError(f"it is cut short, or no .safetensors file ({reason_of(error)})") from None


def load_mapped(path: Path) -> Any:
    """The content of a file that torch has saved, its tensors mapped from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is torn, no such file, or no regular file.
    """
    _check_regular(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types
        torn = not zipfile.is_zipfile(path)
        raise ValueError("it is cut short, or no .pth file" if torn else reason_of(error)) from None


def _check_regular(path: Path) -> None:
    if not is_utf8(str(path)):
        raise ValueError("its name is not UTF-8, which torch and safetensors need")
    try:
        open_regular(path).close()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(reason_of(error)) from None


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
