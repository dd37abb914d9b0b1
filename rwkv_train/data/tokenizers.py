"""Between bytes and tokens.

A tokenizer takes the bytes of a document and gives its tokens; going back, it gives bytes, since a token may end in
the middle of a character. What is to be shown goes through `codecs.getincrementaldecoder("utf-8")("replace")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rwkv_train.errors import UserError

Tokens = npt.NDArray[Any]  # one dimension, an unsigned integer type


class Tokenizer(Protocol):
    """What the rest of the house asks of a tokenizer."""

    @property
    def name(self) -> str:
        """What `data.tokenizer=` calls it; a checkpoint remembers it."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token."""

    @property
    def end_of_text(self) -> int:
        """The token between documents, which a fresh text starts from."""

    def encode(self, text: bytes) -> Tokens:
        """The tokens of one document, without an end-of-text."""

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        """The bytes of some tokens; `decode(encode(text)) == text`."""


class ByteTokenizer:
    """Every byte is a token. Byte 0, which no text file has, stands between documents."""

    name = "bytes"
    vocab_size = 256
    end_of_text = 0

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        return np.asarray(tokens, dtype=np.uint8).tobytes()


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name.

    Raises:
        UserError: no tokenizer is called so.
    """
    if name == "bytes":
        return ByteTokenizer()
    raise UserError(f"data.tokenizer={name} is no tokenizer", "there is: bytes")
