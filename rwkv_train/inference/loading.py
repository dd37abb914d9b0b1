"""Loads the model of a checkpoint, and the tokenizer that it was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rwkv_train.checkpoint.shards import WEIGHT, Reader, StateShard
from rwkv_train.config.schema import from_tree
from rwkv_train.data.sources import find_tokenizer, stores_of
from rwkv_train.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_train.errors import UserError
from rwkv_train.models import LanguageModel, build_model
from rwkv_train.models.detect import detect
from rwkv_train.models.weights import refuse_mismatches

_REMEDY = "--tokenizer gives the one that it was trained with: bytes, world, or the path of a tokenizer.json"


def load_model(checkpoint: Path, device: str = "cpu") -> LanguageModel:
    """The model of a checkpoint directory, sharded or not, or of a .pth file under the field's names.

    The tensors' names and shapes determine its architecture and shape.

    Args:
        checkpoint: the directory or file.
        device: cpu, cuda, or auto: a GPU if there is one.

    Raises:
        UserError: there is no such file, or it is not the weights of a model that can be built here.
    """
    gpu = torch.cuda.is_available()
    if device.startswith("cuda") and not gpu:
        raise UserError(f"--device {device}: torch can use no GPU here", "--device cpu")
    final = checkpoint / "weights.pth"  # a run directory has its final weights there, and so may other directories
    reader = Reader(final if final.exists() and not (checkpoint / "meta.json").exists() else checkpoint)
    model = build_model(detect(reader.shapes, str(checkpoint)), device="meta")
    refuse_mismatches(str(checkpoint), reader.shapes, model)
    model = model.to_empty(device="cpu")
    reader.fill(StateShard(WEIGHT, name, 0, p.detach().view(-1), True) for name, p in model.named_parameters())
    return model.to(("cuda" if gpu else "cpu") if device == "auto" else device).eval()


def find_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint directory, or of the newest checkpoint of the run directory of a .pth file; {}: none.

    It holds, among others, `config` (the run's, as a tree) and `tokenizer` (its identity).
    """
    directories = (
        [checkpoint] if checkpoint.is_dir() else sorted(checkpoint.parent.glob("checkpoints/step_*"), reverse=True)
    )
    for directory in directories:
        try:
            meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(meta, dict):
            return meta
    return {}


def tokenizer_of(checkpoint: Path, vocab_size: int, name: str | None = None) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with: from its meta.json, else by the size of the vocabulary.

    Args:
        checkpoint: a directory, or a .pth file.
        vocab_size: the model's number of tokens.
        name: given by the user: bytes, world or the path of a tokenizer.json; None: not given.

    Raises:
        UserError: it is not the checkpoint's, it has more tokens than the model, or it is unknown.
    """
    meta = find_meta(checkpoint)
    identity = meta.get("tokenizer")
    if name is None:
        tokenizer = _from_meta(checkpoint, meta, identity) if identity else _by_size(vocab_size)
    else:
        extend = (meta.get("config") or {}).get("vocab", {}).get("extend", ())
        tokenizer = load_tokenizer(name, extend)
    if tokenizer is None or tokenizer.vocab_size > vocab_size:
        has = "" if tokenizer is None else f", the tokenizer {tokenizer.name} {tokenizer.vocab_size:,}"
        raise UserError(f"{checkpoint} has a vocabulary of {vocab_size:,} tokens{has}", _REMEDY)
    refuse_other(checkpoint, identity, tokenizer, f"--tokenizer {name}" if name else f"{tokenizer.name} here")
    return tokenizer


def refuse_other(checkpoint: Path, identity: str | None, tokenizer: Tokenizer, what: str) -> None:
    """Raises a UserError if a tokenizer is not the one with the identity in the checkpoint."""
    if identity is not None and tokenizer.identity != identity:
        raise UserError(
            f"{checkpoint} was trained with the tokenizer {identity}, {what} is {tokenizer.identity}: the same "
            "token numbers stand for other texts",
            "leave --tokenizer out, or give the one that the checkpoint was trained with",
        )


def _by_size(vocab_size: int) -> Tokenizer | None:
    known = {256: "bytes", 65536: "world"}.get(vocab_size)
    return None if known is None else load_tokenizer(known)


def _from_meta(checkpoint: Path, meta: Mapping[str, Any], identity: str) -> Tokenizer:
    try:
        config = from_tree(meta["config"])
        return find_tokenizer(config.data, config.vocab.extend, stores_of(config.data))
    except (UserError, KeyError):  # written by another version, or its data has moved
        kind, _, extended = identity.split(":")[0].partition("+")
        if kind in ("bytes", "world") and not extended:
            return load_tokenizer(kind)
        raise UserError(
            f"{checkpoint} was trained with the tokenizer {identity}, which is not found", _REMEDY
        ) from None
