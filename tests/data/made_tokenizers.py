"""Small tokenizer.json files of two kinds, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PIECES = ["the", "na", "caf", "user", "st", "lo", "mi", "ru"]


def byte_level(folder: Path) -> Path:
    """GPT-2's kind: byte-level BPE; every byte is a token, and so are PIECES."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for piece in PIECES:
        for end in range(2, len(piece) + 1):
            if piece[:end] not in pieces:
                pieces.append(piece[:end])
                merges.append((piece[: end - 1], piece[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    return _saved(tokenizer, folder / "byte_level.json")


def metaspace(folder: Path) -> Path:
    """Llama's kind: ▁ for a blank, one before each text, and bytes of characters that are not in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(number) for number in range(33, 127)]
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "▁t"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[("▁", "t")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return _saved(tokenizer, folder / "metaspace.json")


def _saved(tokenizer: Any, path: Path) -> Path:
    tokenizer.save(str(path))
    return path
