"""`rwkv-train export`: the weights of a checkpoint as one file, or as a directory for transformers.

Files are laid out first and then filled through a memory map, so that at most one parameter is in memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.shards import WEIGHT, Reader
from rwkv_train.console import for_stream
from rwkv_train.errors import UserError
from rwkv_train.inference.loading import learned_tokenizer, tokenizer_beside, tokenizer_of
from rwkv_train.inference.tokenizer_files import tokenizer_files
from rwkv_train.models.config import ModelConfig
from rwkv_train.models.detect import detect
from rwkv_train.models.weights import load_mapped

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class TransformersModel:
    """How transformers keeps a model of one of our architectures.

    Args:
        parts: the field's names → transformers' own, part by part of a dotted name; absent parts are the same.
        config: the model's shape → config.json, without the dtype.
    """

    parts: Mapping[str, str]
    config: Callable[[ModelConfig], dict[str, Any]]

    def name(self, name: str) -> str:
        """A parameter's name in transformers."""
        return ".".join(self.parts.get(part, part) for part in name.split("."))


def _rwkv_config(shape: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.n_embd,
        "attention_hidden_size": shape.n_embd,
        "intermediate_size": shape.dim_ffn,
        "num_hidden_layers": shape.n_layer,
        "layer_norm_epsilon": 1e-5,
        "context_length": 1024,
        "rescale_every": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


TRANSFORMERS = {  # by architecture
    "rwkv4": TransformersModel(
        {
            "emb": "rwkv.embeddings",
            "blocks": "rwkv.blocks",
            "ln_out": "rwkv.ln_out",
            "ln0": "pre_ln",
            "att": "attention",
            "ffn": "feed_forward",
            "time_mix_k": "time_mix_key",
            "time_mix_v": "time_mix_value",
            "time_mix_r": "time_mix_receptance",
        },
        _rwkv_config,
    )
}


def export(checkpoint: Path, target: Path, dtype: str | None = None) -> Path:
    """`consolidate`, with every failure as a UserError; a learnt tokenizer is written beside the file."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known", f"valid: {', '.join(DTYPES)}")
    if not checkpoint.exists():
        raise UserError(
            f"there is no checkpoint at {checkpoint}",
            f"give a .pth file or a directory like RUN/checkpoints/{CheckpointName(1000, 1)}",
        )
    if (ending := _ending(target)) not in ("", ".pth", ".safetensors"):
        raise UserError(f"{target}: the ending {ending} is not known", "valid: .pth, .safetensors, a directory")
    try:
        written = consolidate(checkpoint, target, dtype, finite=True)
        if (learned := learned_tokenizer(checkpoint)) is not None and _ending(target):
            tokenizer_beside(written).write_bytes(learned.content)
        return written
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}", "give another path") from None


def consolidate(checkpoint: Path, target: Path, dtype: str | None = None, finite: bool = False) -> Path:
    """Writes a checkpoint's weights under the field's names, or under transformers' own into a directory.

    Args:
        checkpoint: a checkpoint directory, sharded or not, or a .pth or .safetensors file.
        target: out.pth, out.safetensors, or a directory (made here) that transformers' RwkvForCausalLM loads, with the
            tokenizer where it knows one of that kind.
        dtype: float32, bfloat16 or float16; None: as they are, and float32 where they differ.
        finite: whether weights that are not finite are refused.

    Returns:
        the file that was written; it gets its name once it is complete.

    Raises:
        UserError: a part of the checkpoint is missing, a weight is not finite where it must be, or transformers has no
            model of its generation.
        OSError: the target cannot be written.
    """
    reader = Reader(checkpoint, finite=finite)
    if reader.note:
        print(for_stream(reader.note, sys.stderr), file=sys.stderr)
    stored = str(reduce(torch.promote_types, map(reader.dtype, reader.shapes))).removeprefix("torch.")
    kind = dtype or (stored if stored in DTYPES else "float32")
    if ending := _ending(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write = _write_pth if ending == ".pth" else _write_safetensors
        return _written(target, lambda path: write(reader, path, kind, lambda name: name))
    shape = detect(reader.shapes, str(checkpoint))
    if shape.arch not in TRANSFORMERS:
        raise UserError(f"transformers has no model of arch={shape.arch}", "export to .pth or .safetensors")
    theirs = TRANSFORMERS[shape.arch]
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps({**theirs.config(shape), "dtype": kind}, indent=2) + "\n")
    for name, content in _tokenizer_files(checkpoint, shape.vocab_size).items():
        (target / name).write_text(content, encoding="utf-8")
    return _written(target / "model.safetensors", lambda path: _write_safetensors(reader, path, kind, theirs.name))


def _ending(target: Path) -> str:
    """The ending of a file's name; that of rwkv7-1.5b-2025 is a part of a number."""
    return "" if re.fullmatch(r"\.\d+[bBmM]?([-_].*)?", target.suffix) else target.suffix


def _written(target: Path, write: Callable[[Path], None]) -> Path:
    temporary = target.with_name(f".writing-{target.name}")
    try:
        write(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _write_pth(reader: Reader, path: Path, dtype: str, named: Callable[[str], str]) -> None:
    """torch.save's layout without data, then filled through a memory map."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    with FakeTensorMode():
        empty = {named(name): torch.empty(shape, dtype=DTYPES[dtype]) for name, shape in reader.shapes.items()}
    path.touch()  # an OSError, where torch.save would make a RuntimeError of it
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(empty, path)
    with open(path, "r+b") as file:  # a full disk is an OSError now, and not a signal when the map is written
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    before = torch.serialization.get_default_mmap_options()
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    try:
        mapped: dict[str, Tensor] = load_mapped(path)
    finally:
        torch.serialization.set_default_mmap_options(before or mmap.MAP_PRIVATE)
    for name in reader.shapes:
        reader.copy_to(name, mapped[named(name)].view(-1))


def _write_safetensors(reader: Reader, path: Path, dtype: str, named: Callable[[str], str]) -> None:
    """Eight bytes with the length of the header, the header as JSON, the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, size = 0, DTYPES[dtype].itemsize
    for name, shape in reader.shapes.items():
        begin, end = end, end + math.prod(shape) * size
        header[named(name)] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in reader.shapes.items():
            for _, values in reader.read(WEIGHT, name, 0, math.prod(shape)):
                file.write(values.to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes())


def _tokenizer_files(checkpoint: Path, vocab_size: int) -> dict[str, str]:
    """The files of the tokenizer that the checkpoint was trained with, where it is known."""
    try:
        return tokenizer_files(tokenizer_of(checkpoint, vocab_size))
    except UserError:
        return {}
