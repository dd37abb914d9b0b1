"""A checkpoint as something to use: its model, and the tokenizer that it was trained with."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

from rwkv_train.checkpoint.meta import META, CheckpointMeta
from rwkv_train.checkpoint.name import checkpoints_below
from rwkv_train.checkpoint.shards import WEIGHT, Reader, StateShard
from rwkv_train.config.schema import from_tree
from rwkv_train.console import for_stream
from rwkv_train.data.learned import FILE as LEARNED
from rwkv_train.data.learned import LearnedTokenizer, learned_size, read_learned
from rwkv_train.data.sources import find_tokenizer, stores_of
from rwkv_train.data.tokenizers import JsonTokenizer, Tokenizer, extended, load_tokenizer
from rwkv_train.errors import UserError
from rwkv_train.models import LanguageModel, build_model
from rwkv_train.models.detect import detect
from rwkv_train.models.weights import refuse_mismatches

_REMEDY = "--tokenizer names the one that it was trained with: bytes, world, or the path of a tokenizer.json"


def load_model(checkpoint: Path, device: str = "cpu") -> LanguageModel:
    """The model of a checkpoint, sharded or not, of a run directory, or of a .pth or .safetensors file.

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
    reader = Reader(checkpoint, finite=True)
    if reader.note:
        print(for_stream(reader.note, sys.stderr), file=sys.stderr)
    model = build_model(detect(reader.shapes, str(checkpoint)), device="meta")
    refuse_mismatches(str(checkpoint), reader.shapes, model)
    model = model.to_empty(device="cpu")
    shards = (StateShard(WEIGHT, name, 0, p.detach().view(-1), True) for name, p in model.named_parameters())
    reader.fill(shards)
    return model.to(("cuda" if gpu else "cpu") if device == "auto" else device).eval()


def description_of(checkpoint: Path) -> CheckpointMeta | None:
    """The description of a checkpoint directory, or of the newest checkpoint of a run or of the run of a .pth file.

    Returns:
        the description; None: these are weights without a run.

    Raises:
        UserError: meta.json of the checkpoint directory cannot be read.
    """
    if (checkpoint / META).exists():
        return CheckpointMeta.read(checkpoint)
    for path in reversed(checkpoints_below(checkpoint if checkpoint.is_dir() else checkpoint.parent)):
        with suppress(UserError):  # one that is just being deleted
            return CheckpointMeta.read(path)
    return None


def learned_tokenizer(checkpoint: Path) -> LearnedTokenizer | None:
    """The tokenizer that the run of a checkpoint has learnt, from the directory of the run; None: there is none.

    Args:
        checkpoint: a run or checkpoint directory, or a .pth file in that of a run.

    Raises:
        UserError: its file cannot be read.
    """
    meta = description_of(checkpoint)
    if meta is None:
        return None
    name = (meta.config.get("data") or {}).get("tokenizer")
    inside = (checkpoint / META).exists()
    run = checkpoint.absolute().parents[1] if inside else checkpoint if checkpoint.is_dir() else checkpoint.parent
    return read_learned(name if isinstance(name, str) else None, run / LEARNED)


def tokenizer_beside(weights: Path) -> Path:
    """Where `export` puts the learnt tokenizer of exported weights: NAME.tokenizer.json for NAME.pth."""
    return weights.with_name(f"{weights.stem}.tokenizer.json")


def tokenizer_of(checkpoint: Path, vocab_size: int, name: str | None = None) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with, as it remembers it; of bare weights, the one beside
    them, or by the size of their vocabulary.

    Args:
        checkpoint: a directory, or a .pth file.
        vocab_size: the model's number of tokens.
        name: what the user calls it: bytes, world or the path of a tokenizer.json.

    Raises:
        UserError: it is another one than the checkpoint's, it has more tokens than the model, or it is not known which.
    """
    meta = description_of(checkpoint)
    if name is None:
        tokenizer = _of_weights(checkpoint, vocab_size) if meta is None else _from_meta(checkpoint, meta)
    else:
        tokenizer = load_tokenizer(name, () if meta is None else meta.config.get("vocab", {}).get("extend", ()))
    if tokenizer is None or tokenizer.vocab_size > vocab_size:
        has = "" if tokenizer is None else f", the tokenizer {tokenizer.name} {tokenizer.vocab_size:,}"
        raise UserError(f"{checkpoint} has a vocabulary of {vocab_size:,} tokens{has}", _REMEDY)
    refuse_other(
        checkpoint,
        None if meta is None else meta.tokenizer,
        tokenizer,
        f"--tokenizer {name}" if name else f"{tokenizer.name} here",
    )
    return tokenizer


def refuse_other(checkpoint: Path, identity: str | None, tokenizer: Tokenizer, what: str) -> None:
    """Raises a UserError where a tokenizer is not the one whose identity a checkpoint remembers."""
    if identity is not None and tokenizer.identity != identity:
        raise UserError(
            f"{checkpoint} was trained with the tokenizer {identity}, {what} is {tokenizer.identity}: its numbers "
            "would stand for other texts",
            "leave --tokenizer out, or give the one that it was trained with",
        )


def _of_weights(weights: Path, vocab_size: int) -> Tokenizer | None:
    if (beside := tokenizer_beside(weights)).exists():
        return JsonTokenizer(str(beside))
    known = {256: "bytes", 65536: "world"}.get(vocab_size)
    return None if known is None else load_tokenizer(known)


def _from_meta(checkpoint: Path, meta: CheckpointMeta) -> Tokenizer:
    identity = meta.tokenizer
    try:
        config = from_tree(meta.config)
        if learned_size(config.data.tokenizer) is not None:
            if (learned := learned_tokenizer(checkpoint)) is not None:
                return extended(learned, config.vocab.extend)
            raise UserError("its run's directory has no tokenizer.json")
        return find_tokenizer(config.data, config.vocab.extend, stores_of(config.data))
    except UserError:  # the configuration of another version, or its data has moved
        kind, _, added = identity.split(":")[0].partition("+")
        if kind in ("bytes", "world") and not added:
            return load_tokenizer(kind)
        raise UserError(
            f"{checkpoint} was trained with the tokenizer {identity}, which is not found", _REMEDY
        ) from None
