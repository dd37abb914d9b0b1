"""Bytes of tokens, against the texts that were tokenised."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rwkv_train.data.bits_per_byte import bits_per_byte, token_bytes
from rwkv_train.data.tokenizers import load_tokenizer
from tests.data.made_tokenizers import byte_level, metaspace

TEXT = "the 1st naïve café, 我能 😀 <|user|>"


@pytest.mark.parametrize("kind", ["bytes", "world", "byte-level", "metaspace"])
@pytest.mark.parametrize("extend", [(), ("<|user|>", "naïve")])
def test_the_bytes_of_a_text_are_those_of_its_tokens(kind: str, extend: tuple[str, ...], tmp_path: Path) -> None:
    made = {"byte-level": byte_level, "metaspace": metaspace}
    name = str(made[kind](tmp_path)) if kind in made else kind
    tokenizer = load_tokenizer(name, extend)
    table = token_bytes(tokenizer)
    assert table.shape == (tokenizer.vocab_size,)
    assert table[tokenizer.end_of_text] == 1
    tokens = tokenizer.encode(TEXT.encode())
    added = kind == "metaspace"  # a blank before the text
    assert table[tokens].sum() == len(TEXT.encode()) + added
    assert len(set(table[tokens].tolist())) > 1 or (kind == "bytes" and not extend)


def test_a_larger_vocabulary_than_the_tokenizers() -> None:
    assert token_bytes(load_tokenizer("bytes"), 300).tolist() == [1] * 256 + [0] * 44
    assert len(token_bytes(load_tokenizer("bytes"), 200)) == 256


def test_bits() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
    assert bits_per_byte(math.log(2), 0) == pytest.approx(1)
