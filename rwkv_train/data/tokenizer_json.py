"""Our tokenizers as the files that transformers loads: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_train.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, byte_signs

END = "\0"  # byte 0, which stands between documents


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """File name → content; {} where transformers has no tokenizer of that kind (World, tokens of your own)."""
    if isinstance(tokenizer, ByteTokenizer):
        return {"tokenizer.json": _bytes(), "tokenizer_config.json": _config(END)}
    if isinstance(tokenizer, JsonTokenizer):
        content = Path(tokenizer.name).expanduser().read_text(encoding="utf-8")
        end = tokenizer.decode([tokenizer.end_of_text]).decode()
        return {"tokenizer.json": content, "tokenizer_config.json": _config(end)}
    return {}


def _bytes() -> str:
    """A byte-level BPE without merges, whose pieces are the bytes; byte 0 is a special token of its own.

    It encodes and decodes any text as `ByteTokenizer` does.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Rust

    pieces = {sign: byte for sign, byte in byte_signs().items() if byte} | {END: 0}
    tokenizer = Rust(models.BPE(vocab=pieces, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    return str(tokenizer.to_str(pretty=True))


def _config(end: str) -> str:
    settings: Mapping[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(settings, indent=2) + "\n"
