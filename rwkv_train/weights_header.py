"""The shape of the model in a .pth file, from the file's table of tensors alone: no torch, no weight is read."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_train.errors import UserError


class Shape(NamedTuple):
    n_layer: int
    n_embd: int
    dim_ffn: int
    vocab_size: int


def read_shape(path: Path) -> Shape | None:
    """The shape of an RWKV model's weights; None where there is no such file (the checks say so).

    Args:
        path: a .pth file, or a checkpoint directory with weights.pth in it.

    Raises:
        UserError: the file is torn, or holds something else.
    """
    file = path / "weights.pth" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        file = path / "meta.json"  # of a checkpoint whose weights lie in several files
    if not file.exists():
        return None
    try:
        shapes = _shapes(file)
        vocab_size, n_embd = shapes["emb.weight"]
        width = shapes["blocks.0.ffn.key.weight"][0]
        generation_4 = len(shapes["blocks.0.att.time_first"]) == 1
        layers = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    except (OSError, zipfile.BadZipFile, StopIteration, pickle.UnpicklingError, EOFError) as error:
        broken = isinstance(error, zipfile.BadZipFile)
        reason = "it is cut short, or no .pth file" if broken else error or "it has no table of tensors"
        raise UserError(f"{file} cannot be read as weights: {reason}", "copy it anew, or give another file") from None
    except (KeyError, TypeError, ValueError, IndexError):
        held = ", ".join(map(str, list(shapes)[:2])) if isinstance(shapes, dict) else type(shapes).__name__
        raise UserError(
            f"{file} does not hold the weights of an RWKV-4 model under the field's names (it holds {held}, …)",
            "give weights with emb.weight, blocks.0.att.key.weight, …",
        ) from None
    if not generation_4:
        raise UserError(f"{file} is of another generation than RWKV-4", "known: rwkv4")
    return Shape(max(layers) + 1, n_embd, width, vocab_size)


def _shapes(file: Path) -> Any:
    if file.name == "meta.json":
        return json.loads(file.read_text())["shapes"]
    with zipfile.ZipFile(file) as archive:
        table = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(table) as stream:
            return _Table(stream).load()


class _Table(pickle.Unpickler):
    """Reads torch's table of tensors with every tensor replaced by its size; nothing else can be made of it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, size, *rest: tuple(size)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda size, *rest: size
        if module.split(".")[0] == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> None:
        return None
