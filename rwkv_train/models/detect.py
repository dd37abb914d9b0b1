"""Which architecture and shape a file of weights has, from its table of tensors alone: no torch, no weight is read."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_train.errors import UserError
from rwkv_train.json_files import MAX_BYTES, load_object, open_regular, parse_json, reason_of
from rwkv_train.models.config import ModelConfig
from rwkv_train.models.registry import ARCHITECTURES, Shapes
from rwkv_train.models.state_dict import unwrapped

_LEGACY_BEGIN = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # of torch's format before 1.6
_DTYPES = {
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "int64",
    "int32",
    "bool",
}  # that a file of other things may name
_MAX_MEMO = 2**24  # entries of a pickle's memo

# Other models under the field's names, newest first: what their files have and those of earlier ones do not.
_SUCCESSORS = {  # experimental ones, of which some have all tensors of an architecture that can be trained
    "RWKV-8": r"blocks\.\d+\.ffn\.enn.*",
    "RWKV-7b": r"(.*\.)?qkv\..*",
    "RWKV-7a": r"blocks\.\d+\.ffn\.s_emb.*",
}
_OTHERS = {
    "RWKV-6": r"blocks\.\d+\.att\.time_maa_.*",
    "RWKV-5": r"blocks\.\d+\.att\.(time_faaaa|ln_x\.weight)",
}


def detect(shapes: Shapes, what: str = "the dict of weights") -> ModelConfig:
    """The architecture and shape of the model that weights belong to.

    Args:
        shapes: parameter name → shape, under the field's names.
        what: where they come from, for the message.

    Raises:
        UserError: they are not those of an architecture that can be trained here.
    """
    if (missing := _missing_layer(shapes)) is not None:
        raise UserError(f"{what} lacks {missing}, and has later ones", "copy it again, or give another file")
    _refuse(_SUCCESSORS, shapes, what)
    for entry in ARCHITECTURES.values():
        try:
            found = entry.recognise(shapes)
        except (KeyError, IndexError, ValueError):
            continue
        if found is not None:
            return found
    _refuse(_OTHERS, shapes, what)
    held = ", ".join(list(shapes)[:2]) + ", …" if shapes else "nothing"
    raise UserError(
        f"{what} does not hold the weights of a language model under the field's names (it holds {held})",
        f"give weights with emb.weight, blocks.0.att.key.weight, … (known: arch={', '.join(ARCHITECTURES)})",
    )


def _refuse(others: Mapping[str, str], shapes: Shapes, what: str) -> None:
    """Raises a UserError where a name matches the pattern of an architecture that cannot be trained."""
    for other, pattern in others.items():
        if any(re.fullmatch(pattern, name) for name in shapes):
            raise UserError(
                f"{what} holds weights of {other}, which this version cannot train",
                f"known: arch={', '.join(ARCHITECTURES)}",
            )


def _missing_layer(shapes: Shapes) -> str | None:
    """The first of the layers that are not there below the last one; None: all are."""
    layers = {found[1] for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    return next((f"blocks.{n}" for n in range(len(layers)) if str(n) not in layers), None)


def detect_file(path: Path) -> ModelConfig | None:
    """The same of a .pth or .safetensors file or a checkpoint directory, sharded or not; None: there is no such file.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    file = path / "weights.pth" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        file = path / "meta.json"  # of a sharded checkpoint
    return detect(read_shapes(file), str(file)) if file.exists() else None


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a .pth or .safetensors file or a checkpoint's meta.json, by the field's names.

    Raises:
        UserError: the file is damaged.
    """
    try:
        table = load_object(file)["shapes"] if file.name == "meta.json" else _parameters(file)
    except zipfile.BadZipFile:
        reason = "it is cut short, or no .pth file"
    except StopIteration:
        reason = "it has no table of tensors"
    except Exception as error:  # a pickle of a stranger raises any type
        reason = reason_of(error)
    else:
        if not isinstance(table, Mapping):
            table = {f"a {type(table).__name__}": ()}
        return {str(name): _shape(size) for name, size in table.items()}
    raise UserError(f"{file} cannot be read as weights: {reason}", "copy it again, or give another file")


def _shape(size: Any) -> tuple[int, ...]:
    """A shape; () where it is none."""
    known = isinstance(size, list | tuple) and all(type(n) is int and 0 <= n < 2**48 for n in size)
    return tuple(size) if known else ()


def _parameters(file: Path) -> Any:
    """What is in the place of the parameters: of a tensor its shape."""
    return unwrapped(_table(file), lambda value: isinstance(value, _Size))[0]


def _table(file: Path) -> Any:
    """The content of a file with each tensor replaced by its size."""
    with open_regular(file) as source:
        if is_safetensors(file):
            return _safetensors_table(source)
        if is_legacy(file):
            return _legacy_table(source)
        with zipfile.ZipFile(source) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as stream:
                table = stream.read(MAX_BYTES + 1)
    if len(table) > MAX_BYTES:
        raise ValueError("its table of tensors is too large")
    return _unpickled(io.BytesIO(table))


def is_safetensors(file: Path) -> bool:
    """Whether a file's name says that it is one of the safetensors library."""
    return file.suffix.lower() == ".safetensors"


def is_legacy(file: Path) -> bool:
    """Whether a regular file is of torch's format before 1.6."""
    with open_regular(file) as source:
        return source.read(len(_LEGACY_BEGIN)) == _LEGACY_BEGIN


def _safetensors_table(source: BinaryIO) -> dict[str, Any]:
    """Eight bytes with the length of the header, then the header: a JSON object with an entry for each tensor."""
    length = int.from_bytes(source.read(8), "little")
    if not 2 <= length <= MAX_BYTES:
        raise ValueError("it is no .safetensors file")
    header = parse_json(source.read(length))
    if not isinstance(header, dict):
        raise ValueError("it is no .safetensors file")
    header.pop("__metadata__", None)
    return {name: _Size(_shape(entry["shape"])) for name, entry in header.items()}


def _legacy_table(source: BinaryIO) -> Any:
    """torch's format before 1.6: pickles of a mark, a version, the machine's properties and the content, then data."""
    pickles = io.BytesIO(source.read(MAX_BYTES))
    for _ in range(3):
        _unpickled(pickles)
    return _unpickled(pickles)


def _unpickled(stream: BinaryIO) -> Any:
    """The content of the next pickle of a stream."""
    begin = stream.tell()
    for opcode, argument, _ in pickletools.genops(stream):  # the unpickler reserves memory up to the largest number
        if "PUT" in opcode.name and isinstance(argument, int) and argument > _MAX_MEMO:
            raise ValueError("its table of tensors is damaged")
    stream.seek(begin)
    return _Table(stream).load()


class _Size(tuple[int, ...]):
    """The size of a tensor, in its place."""


class _Table(pickle.Unpickler):
    """Reads torch's table of tensors with every tensor replaced by its size; it can make nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, size, *rest: _Size(size)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda size, *rest: size
        if module.split(".")[0] == "torch" and name.endswith("Storage"):
            return name
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> None:
        return None
