"""Between bytes and tokens.

A tokenizer takes the bytes of a document and gives its tokens; going back, it gives bytes, since a token may end in
the middle of a character. What is to be shown goes through `codecs.getincrementaldecoder("utf-8")("replace")`.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rwkv_train.errors import UserError

Tokens = npt.NDArray[Any]  # one dimension, an unsigned integer type

ENDS_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")  # what tokenizer.json files call it


class Tokenizer(Protocol):
    """What the rest of the house asks of a tokenizer."""

    @property
    def name(self) -> str:
        """What `data.tokenizer=` calls it."""

    @property
    def identity(self) -> str:
        """Name and hash of all that decides its tokens: stores and checkpoints remember it."""

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

    name = identity = "bytes"
    vocab_size = 256
    end_of_text = 0

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        return np.asarray(tokens, dtype=np.uint8).tobytes()


class WorldTokenizer:
    """RWKV World (vocabulary v20230424): the longest known piece of bytes is taken, again and again.

    Text goes through the Rust wheel; bytes that are no UTF-8 through the same rule here: the wheel knows text only.
    """

    name = "world"
    vocab_size = 65536  # what the World models have; the highest token in use is 65529
    end_of_text = 0

    def __init__(self) -> None:
        from pyrwkv_tokenizer import RWKVTokenizer

        self._wheel = RWKVTokenizer()

    @cached_property
    def identity(self) -> str:
        return f"world:{_hash(self._vocabulary.read_bytes())}"

    def encode(self, text: bytes) -> Tokens:
        try:
            tokens = self._wheel.encode(text.decode())
        except UnicodeDecodeError:
            tokens = self._encode_bytes(text)
        return np.fromiter(tokens, np.uint16, len(tokens))

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        pieces = self._pieces
        return b"".join(pieces.get(int(token), b"") for token in tokens)

    @cached_property
    def _vocabulary(self) -> Path:
        import pyrwkv_tokenizer

        return Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        """Token → bytes. A line of the vocabulary is: token, Python literal, number of bytes."""
        pieces = {}
        for line in self._vocabulary.read_text(encoding="utf-8").splitlines():
            number, literal = line[: line.rindex(" ")].split(" ", 1)
            piece = ast.literal_eval(literal)
            pieces[int(number)] = piece.encode() if isinstance(piece, str) else piece
        return pieces

    @cached_property
    def _numbers(self) -> dict[bytes, int]:
        return {piece: number for number, piece in self._pieces.items()}

    @cached_property
    def _sizes(self) -> dict[bytes, list[int]]:
        """The lengths of the pieces that begin with these (one or two) bytes, the longest first."""
        sizes: dict[bytes, set[int]] = {}
        for piece in self._numbers:
            sizes.setdefault(piece[:2], set()).add(len(piece))
        return {head: sorted(lengths, reverse=True) for head, lengths in sizes.items()}

    def _encode_bytes(self, text: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(text):
            head = text[at : at + 2]
            for size in (*self._sizes.get(head, ()), 1):  # every single byte is a piece
                number = self._numbers.get(text[at : at + size])
                if number is not None:
                    tokens.append(number)
                    at += size
                    break
        return tokens


class JsonTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`, such as that of GPT-NeoX-20B, which the RWKV-4 Pile models use.

    Text that is no UTF-8 has its broken bytes replaced by U+FFFD.

    Args:
        path: of the file.

    Raises:
        UserError: the file cannot be read as a tokenizer, or has no token for the end of a text.
    """

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer

        file = Path(path).expanduser()
        self.name = path
        try:
            content = file.read_bytes()
            self._tokenizer = Tokenizer.from_str(content.decode())
        except OSError as error:
            raise UserError(f"the tokenizer {path} cannot be read: {error.strerror}", _THERE_IS) from None
        except Exception as error:  # the Rust side raises bare Exceptions
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"{path} is no tokenizer.json: {reason}", _THERE_IS) from None
        self.identity = f"json:{_hash(content)}"
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        ends = [number for name in ENDS_OF_TEXT if (number := self._tokenizer.token_to_id(name)) is not None]
        if not ends:
            raise UserError(
                f"{path} has no token for the end of a text",
                f"add one of {', '.join(ENDS_OF_TEXT)} to its added_tokens",
            )
        self.end_of_text = ends[0]

    def encode(self, text: bytes) -> Tokens:
        tokens = self._tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        return np.fromiter(tokens, smallest(self.vocab_size), len(tokens))

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        numbers = [int(token) for token in tokens]
        if self._byte_level is None:
            return str(self._tokenizer.decode(numbers, skip_special_tokens=False)).encode()
        return b"".join(self._byte_level.get(number, b"") for number in numbers)

    @cached_property
    def _byte_level(self) -> dict[int, bytes] | None:
        """Token → bytes where every character of a token stands for one byte (GPT-2's way), else None."""
        if type(self._tokenizer.decoder).__name__ != "ByteLevel":
            return None
        byte_of = byte_signs()
        added = {number: token.content for number, token in self._tokenizer.get_added_tokens_decoder().items()}
        pieces = {}
        for piece, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            plain = number in added or any(sign not in byte_of for sign in piece)
            pieces[number] = piece.encode() if plain else bytes(byte_of[sign] for sign in piece)
        return pieces


def byte_signs() -> dict[str, int]:
    """The character that GPT-2's byte-level tokenizers write for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


class Extended:
    """A tokenizer with tokens of your own behind its vocabulary (`vocab.extend=[…]`).

    Args:
        base: the tokenizer.
        extra: the texts that become one token each, whatever the base would make of them.

    Raises:
        UserError: a text is empty or there twice.
    """

    def __init__(self, base: Tokenizer, extra: Sequence[str]) -> None:
        if not all(extra) or len(set(extra)) < len(extra):
            raise UserError(f"vocab.extend={list(extra)} has an empty token, or one twice", "give different texts")
        self.base, self.extra = base, tuple(text.encode() for text in extra)
        self.name, self.end_of_text = base.name, base.end_of_text
        self.identity = f"{base.identity}+{len(extra)}:{_hash(chr(0).encode().join(self.extra))}"
        self.vocab_size = base.vocab_size + len(extra)
        self._number = {text: base.vocab_size + n for n, text in enumerate(self.extra)}
        longest_first = sorted(self.extra, key=len, reverse=True)
        self._split = re.compile(b"(" + b"|".join(map(re.escape, longest_first)) + b")")

    def encode(self, text: bytes) -> Tokens:
        kind = smallest(self.vocab_size)
        pieces = [
            np.full(1, self._number[piece], kind) if piece in self._number else self.base.encode(piece).astype(kind)
            for piece in self._split.split(text)
            if piece
        ]
        return np.concatenate(pieces) if pieces else np.zeros(0, kind)

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        first = self.base.vocab_size
        return b"".join(
            self.extra[token - first] if token >= first else self.base.decode([token]) for token in map(int, tokens)
        )


def smallest(vocab_size: int) -> Any:
    """The type that tokens are stored in: uint16 where it holds them all, else int32."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def load_tokenizer(name: str, extend: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of that name: bytes, world, or the path of a tokenizer.json; with tokens of your own behind it.

    Raises:
        UserError: no tokenizer is called so, or its file cannot be read.
    """
    base: Tokenizer
    if name == "bytes":
        base = ByteTokenizer()
    elif name == "world":
        base = _world()
    elif name.endswith(".json"):
        base = JsonTokenizer(name)
    else:
        raise UserError(f"data.tokenizer={name} is no tokenizer", _THERE_IS)
    return Extended(base, extend) if extend else base


@cache
def _world() -> WorldTokenizer:
    return WorldTokenizer()  # reading its vocabulary takes half a second


_THERE_IS = "there is: bytes, world, or the path of a tokenizer.json"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
