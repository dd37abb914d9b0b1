"""Small tokenizer.json files of the kinds that published models have, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LETTERS = [*map(chr, range(33, 127)), *"éàü数据😀"]
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


def llama(folder: Path) -> Path:
    """Llama-2's kind: a normalizer that writes ▁ for blanks and puts one before each text, and bytes as a fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127)), "▁a", "▁h"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "h")]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return _saved(tokenizer, folder / "llama.json")


def t5(folder: Path) -> Path:
    """T5's kind: Unigram pieces and Metaspace, without bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -5.0), ("▁dog", -2.0), ("▁and", -2.0), *((c, -9.0) for c in LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _saved(tokenizer, folder / "t5.json")


def bert(folder: Path) -> Path:
    """BERT's kind: WordPiece, ## for what continues a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [
        "[UNK]",
        "</s>",
        "dog",
        "and",
        "hello",
        "##s",
        *LETTERS,
        *(f"##{letter}" for letter in LETTERS if letter != "s"),
    ]
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _saved(tokenizer, folder / "bert.json")


def byte_level_sequence(folder: Path) -> Path:
    """GPT-2's kind, with its decoder inside a sequence."""
    from tokenizers import Tokenizer, decoders

    tokenizer = Tokenizer.from_file(str(byte_level(folder)))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    return _saved(tokenizer, folder / "byte_level_sequence.json")


def _saved(tokenizer: Any, path: Path) -> Path:
    tokenizer.save(str(path))
    return path
