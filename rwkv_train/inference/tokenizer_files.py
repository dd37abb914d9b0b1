"""The files with which transformers loads a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rwkv_train.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, byte_characters

_BYTE_END = "\0"  # byte 0, the end of text of ByteTokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files with which transformers loads a tokenizer: file name → content.

    Empty for World and for extended vocabularies: transformers has no such tokenizer.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return {"tokenizer.json": _byte_tokenizer_json(), "tokenizer_config.json": _tokenizer_config(_BYTE_END)}
    if isinstance(tokenizer, JsonTokenizer):
        content = tokenizer.content.decode()
        end = tokenizer.decode([tokenizer.end_of_text]).decode()
        return {"tokenizer.json": content, "tokenizer_config.json": _tokenizer_config(end)}
    return {}


def _byte_tokenizer_json() -> str:
    """ByteTokenizer as a tokenizer.json: byte-level BPE without merges, with byte 0 as a special token."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HubTokenizer

    pieces = {character: byte for character, byte in byte_characters().items() if byte} | {_BYTE_END: 0}
    tokenizer = HubTokenizer(models.BPE(vocab=pieces, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_BYTE_END, normalized=False, special=True)])
    return str(tokenizer.to_str(pretty=True))


def _tokenizer_config(end: str) -> str:
    settings: Mapping[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(settings, indent=2) + "\n"
