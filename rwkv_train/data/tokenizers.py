"""Tokenizers: bytes to tokens and back, and the tokenizer files that transformers loads.

Decoding returns bytes, because a token may end in the middle of a character. Text for a screen goes through
`codecs.getincrementaldecoder("utf-8")("replace")`.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rwkv_train.data.arrays import Ints
from rwkv_train.errors import UserError
from rwkv_train.json_files import read_regular, reason_of
from rwkv_train.user_path import user_path

Tokens = npt.NDArray[Any]  # one-dimensional, of an integer type

MAX_TOKENIZER_BYTES = 2**28  # of a tokenizer.json
END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")  # in tokenizer.json files


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    @property
    def name(self) -> str:
        """The value of `data.tokenizer=`."""

    @property
    def identity(self) -> str:
        """Kind and hash of everything that determines its tokens; recorded in stores and checkpoints."""

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary: one more than the largest token."""

    @property
    def end_of_text(self) -> int:
        """The token between documents, and the input before the first token of a text."""

    def encode(self, text: bytes) -> Tokens:
        """The tokens of a document, (N,), without an end-of-text."""

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        """The bytes of tokens; `decode(encode(text)) == text` for UTF-8."""

    def byte_counts(self) -> Ints:
        """Bytes of text that each token stands for, int64 (vocab_size,); 0 for a number that is no token."""


class ByteTokenizer:
    """Every byte is a token; byte 0, which text files do not contain, is the end of text."""

    name = identity = "bytes"
    vocab_size = 256
    end_of_text = 0

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        return np.asarray(tokens, dtype=np.uint8).tobytes()

    def byte_counts(self) -> Ints:
        return np.ones(self.vocab_size, np.int64)


class WorldTokenizer:
    """RWKV World (vocabulary v20230424): greedy longest match of byte sequences.

    UTF-8 is encoded by the pyrwkv_tokenizer package, which accepts nothing else; other bytes by the same rule here.
    """

    name = "world"
    vocab_size = 65536  # of the World models; the largest token in use is 65529
    end_of_text = 0

    def __init__(self) -> None:
        from pyrwkv_tokenizer import RWKVTokenizer

        self._rust_tokenizer = RWKVTokenizer()

    @cached_property
    def identity(self) -> str:
        return f"world:{_hash(self._vocabulary.read_bytes())}"

    def encode(self, text: bytes) -> Tokens:
        try:
            tokens = self._rust_tokenizer.encode(text.decode())
        except UnicodeDecodeError:
            tokens = self._encode_bytes(text)
        return np.fromiter(tokens, np.uint16, len(tokens))

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        pieces = self._pieces
        return b"".join(pieces.get(int(token), b"") for token in tokens)

    def byte_counts(self) -> Ints:
        return _lengths(self._pieces, self.vocab_size)

    @cached_property
    def _vocabulary(self) -> Path:
        import pyrwkv_tokenizer

        return Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        """Token → bytes. A line of the vocabulary file is: token, Python literal, number of bytes."""
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
        """Lengths of the pieces that begin with one or two given bytes, longest first."""
        sizes: dict[bytes, set[int]] = {}
        for piece in self._numbers:
            sizes.setdefault(piece[:2], set()).add(len(piece))
        return {head: sorted(lengths, reverse=True) for head, lengths in sizes.items()}

    def _encode_bytes(self, text: bytes) -> list[int]:
        tokens, offset = [], 0
        while offset < len(text):
            head = text[offset : offset + 2]
            for size in (*self._sizes.get(head, ()), 1):  # every single byte is a piece
                number = self._numbers.get(text[offset : offset + size])
                if number is not None:
                    tokens.append(number)
                    offset += size
                    break
        return tokens


class JsonTokenizer:
    """A tokenizer.json file of Hugging Face's `tokenizers`, such as GPT-NeoX-20B's, which the RWKV-4 Pile models use.

    Bytes that are not UTF-8 are replaced by U+FFFD. Truncation and padding that the file asks for are switched off.

    Args:
        path: path of the file.
        content: of the file; None: it is read.

    Attributes:
        content: of the file.
        note: a sentence about what of the file is not obeyed; empty if nothing.

    Raises:
        UserError: the file cannot be read or is not a tokenizer, or has no end-of-text token.
    """

    def __init__(self, path: str, content: bytes | None = None) -> None:
        from tokenizers import Tokenizer

        self.name = path
        self.content = content = self.read(user_path(path)) if content is None else content
        try:
            self._tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:  # the Rust side raises bare Exceptions
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"{path} is not a tokenizer.json: {reason}", _KNOWN_TOKENIZERS) from None
        asked = {"truncation": self._tokenizer.truncation, "padding": self._tokenizer.padding}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ignored = " and ".join(name for name, settings in asked.items() if settings)
        self.note = f"{path} asks for {ignored} of each text, which is switched off" if ignored else ""
        self.identity = f"json:{_hash(content)}"
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        ends = [number for name in END_OF_TEXT_NAMES if (number := self._tokenizer.token_to_id(name)) is not None]
        if not ends:
            raise UserError(
                f"{path} has no end-of-text token",
                f"add one of {', '.join(END_OF_TEXT_NAMES)} to its added_tokens",
            )
        self.end_of_text = ends[0]

    @staticmethod
    def read(path: Path) -> bytes:
        """The content of a file.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return read_regular(path, MAX_TOKENIZER_BYTES)
        except (OSError, ValueError) as error:
            raise UserError(f"the tokenizer {path} cannot be read: {reason_of(error)}", _KNOWN_TOKENIZERS) from None

    def encode(self, text: bytes) -> Tokens:
        tokens = self._tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        return np.fromiter(tokens, token_dtype(self.vocab_size), len(tokens))

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        numbers = [int(token) for token in tokens]
        if self._byte_level is None:
            return str(self._tokenizer.decode(numbers, skip_special_tokens=False)).encode()
        return b"".join(self._byte_level.get(number, b"") for number in numbers)

    def byte_counts(self) -> Ints:
        """As in the middle of a text: where the tokenizer puts a blank before each text, that blank counts as well."""
        if self._byte_level is not None:
            return _lengths(self._byte_level, self.vocab_size)
        before = self.encode(b"a")[:1].tolist()
        known, counts = len(self.decode(before)), np.zeros(self.vocab_size, np.int64)
        for piece, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if _SINGLE_BYTE.fullmatch(piece):
                counts[number] = 1  # alone it is rarely a character, and would be decoded as U+FFFD
            else:
                counts[number] = len(self.decode([*before, number])) - known
        return counts

    @cached_property
    def _byte_level(self) -> dict[int, bytes] | None:
        """Token → bytes if every character of a token represents one byte (byte-level BPE, as in GPT-2), else None."""
        if type(self._tokenizer.decoder).__name__ != "ByteLevel":
            return None
        byte_of = byte_characters()
        added = {number: token.content for number, token in self._tokenizer.get_added_tokens_decoder().items()}
        pieces = {}
        for piece, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            plain = number in added or any(character not in byte_of for character in piece)
            pieces[number] = piece.encode() if plain else bytes(byte_of[character] for character in piece)
        return pieces


_SINGLE_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of the decoder ByteFallback


def _lengths(pieces: Mapping[int, bytes], vocab_size: int) -> Ints:
    """Bytes of the piece of each token, int64 (vocab_size,)."""
    return np.fromiter((len(pieces.get(token, b"")) for token in range(vocab_size)), np.int64, vocab_size)


def byte_characters() -> dict[str, int]:
    """The character that byte-level BPE (GPT-2) writes for each byte: character → byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # represent themselves
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class ExtendedTokenizer:
    """A tokenizer with additional tokens after its vocabulary (`vocab.extend=[…]`).

    Args:
        base: the tokenizer that is extended.
        extra: texts that become a single token each, whatever `base` would make of them.

    Raises:
        UserError: a text is empty or occurs twice.
    """

    def __init__(self, base: Tokenizer, extra: Sequence[str]) -> None:
        if not all(extra) or len(set(extra)) < len(extra):
            raise UserError(
                f"vocab.extend={list(extra)} has an empty or a repeated token", "give different, non-empty texts"
            )
        self.base, self.extra = base, tuple(text.encode() for text in extra)
        self.name, self.end_of_text = base.name, base.end_of_text
        self.identity = f"{base.identity}+{len(extra)}:{_hash(chr(0).encode().join(self.extra))}"
        self.vocab_size = base.vocab_size + len(extra)
        self._number = {text: base.vocab_size + n for n, text in enumerate(self.extra)}
        longest_first = sorted(self.extra, key=len, reverse=True)
        self._split = re.compile(b"(" + b"|".join(map(re.escape, longest_first)) + b")")

    def encode(self, text: bytes) -> Tokens:
        dtype = token_dtype(self.vocab_size)
        pieces = [
            np.full(1, self._number[piece], dtype) if piece in self._number else self.base.encode(piece).astype(dtype)
            for piece in self._split.split(text)
            if piece
        ]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype)

    def decode(self, tokens: Sequence[int] | Tokens) -> bytes:
        first = self.base.vocab_size
        runs = groupby(map(int, tokens), key=lambda token: token >= first)
        return b"".join(
            b"".join(self.extra[token - first] for token in run) if is_extra else self.base.decode(list(run))
            for is_extra, run in runs
        )

    def byte_counts(self) -> Ints:
        return np.concatenate((self.base.byte_counts(), np.fromiter(map(len, self.extra), np.int64)))


def decode_after(tokenizer: Tokenizer, before: Sequence[int], tokens: Sequence[int]) -> bytes:
    """The bytes of tokens that follow others: with the blank that some tokenizers leave out at the start of a text."""
    known = tokenizer.decode(before[-_TOKENS_BEFORE:])
    return tokenizer.decode([*before[-_TOKENS_BEFORE:], *tokens])[len(known) :]


def tokenizer_note(tokenizer: Tokenizer) -> str:
    """A sentence about what of a tokenizer's file is not obeyed; empty if nothing."""
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    return base.note if isinstance(base, JsonTokenizer) else ""


_TOKENS_BEFORE = 8  # that may change how the next one is decoded


def token_dtype(vocab_size: int) -> Any:
    """The type in which tokens are stored: uint16 for vocabularies up to 65,536, else int32."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def load_tokenizer(name: str, extend: Sequence[str] = ()) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        name: bytes, world, or the path of a tokenizer.json (`data.tokenizer`).
        extend: texts that become single tokens after its vocabulary (`vocab.extend`).

    Raises:
        UserError: the name is unknown, its file cannot be read, or `extend` has an empty or a repeated text.
    """
    base: Tokenizer
    if name == "bytes":
        base = ByteTokenizer()
    elif name == "world":
        base = _world()
    elif name.endswith(".json"):
        base = JsonTokenizer(name)
    else:
        raise UserError(f"data.tokenizer={name} is not a known tokenizer", _KNOWN_TOKENIZERS)
    return extended(base, extend)


def extended(base: Tokenizer, extend: Sequence[str]) -> Tokenizer:
    """A tokenizer with further tokens, if there are any.

    Raises:
        UserError: a text is empty or occurs twice.
    """
    return ExtendedTokenizer(base, extend) if extend else base


@cache
def _world() -> WorldTokenizer:
    return WorldTokenizer()  # reading its vocabulary takes half a second


_KNOWN_TOKENIZERS = "give bytes, world, bpe:SIZE (learnt from your text), or the path of a tokenizer.json"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
