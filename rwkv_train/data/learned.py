"""A vocabulary that is learnt from the training text: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rwkv_train.data.tokenizers import (
    END_OF_TEXT_NAMES,
    ExtendedTokenizer,
    JsonTokenizer,
    Tokenizer,
    Tokens,
    byte_characters,
    token_dtype,
)
from rwkv_train.errors import UserError

FILE = "tokenizer.json"  # in the directory of a run
_PREFIX = "bpe:"
_MIN_SIZE, _MAX_SIZE = 257, 2**16  # 256 bytes and the end-of-text
_NO_UTF8 = re.compile("[\udc80-\udcff]")  # how Python decodes a byte that is no UTF-8 with "surrogateescape"


def learned_size(name: str | None) -> int | None:
    """The size of the vocabulary that `data.tokenizer=bpe:SIZE` asks for; None: the name asks for no learnt one.

    Raises:
        UserError: the size is no number, or too small or too large.
    """
    if name is None or not name.startswith(_PREFIX):
        return None
    text = name.removeprefix(_PREFIX)
    if not (text.isascii() and text.isdigit() and _MIN_SIZE <= int(text[:9]) <= _MAX_SIZE):
        raise UserError(
            f"data.tokenizer={name}: {text or 'nothing'} is no size of a vocabulary",
            f"give {_MIN_SIZE} to {_MAX_SIZE} tokens, like bpe:2048",
        )
    return int(text)


class LearnedTokenizer(JsonTokenizer):
    """Byte-level BPE whose vocabulary has exactly the size asked for; every text is encoded without loss.

    Bytes that are not UTF-8 are tokens of their own. A text that spells the end-of-text does not become one.

    Args:
        name: bpe:SIZE. A short text may have less to learn: the last tokens are then unused.
        content: of the tokenizer.json.

    Raises:
        UserError: the content is no such tokenizer.
    """

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(name, content)
        size = learned_size(name)
        assert size is not None
        if self.vocab_size > size or self._byte_level is None:
            raise UserError(f"{FILE} is no tokenizer of data.tokenizer={name}", "remove it, and begin the run again")
        self.vocab_size = size
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        self._bytes = [vocabulary[character] for character in sorted_byte_characters()]

    def encode(self, text: bytes) -> Tokens:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Iterable[bytes]) -> list[Tokens]:
        decoded = [text.decode(errors="surrogateescape") for text in texts]
        plain = [None if _NO_UTF8.search(text) else text for text in decoded]
        found = iter(self._tokenizer.encode_batch_fast([text for text in plain if text is not None]))
        dtype = token_dtype(self.vocab_size)
        return [
            np.asarray(self._with_bytes(text) if whole is None else next(found).ids, dtype)
            for whole, text in zip(plain, decoded, strict=True)
        ]

    def _with_bytes(self, text: str) -> list[int]:
        tokens, end = [], 0
        for match in _NO_UTF8.finditer(text):
            tokens += self._tokenizer.encode(text[end : match.start()]).ids
            tokens.append(self._bytes[ord(match[0]) - 0xDC00])
            end = match.end()
        return tokens + self._tokenizer.encode(text[end:]).ids


def sorted_byte_characters() -> list[str]:
    """The character of byte-level BPE for each byte, in the order of the bytes."""
    return [character for character, _ in sorted(byte_characters().items(), key=lambda item: item[1])]


def learn(name: str, texts: Iterable[bytes]) -> LearnedTokenizer:
    """Learns a vocabulary, the same one for the same texts: about two seconds for ten megabytes on two cores.

    Args:
        name: bpe:SIZE.
        texts: of the training documents.
    """
    from tokenizers import Tokenizer as HubTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=learned_size(name) or 0,
        special_tokens=[END_OF_TEXT_NAMES[0]],
        initial_alphabet=sorted_byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode(errors="ignore") for text in texts), trainer)
    return LearnedTokenizer(name, tokenizer.to_str().encode())


def read_learned(name: str | None, path: Path) -> LearnedTokenizer | None:
    """The learnt tokenizer of a run.

    Args:
        name: the run's data.tokenizer.
        path: of the tokenizer.json; None is returned where there is none, or where `name` asks for no learnt one.

    Raises:
        UserError: the file cannot be read.
    """
    if learned_size(name) is None or not path.exists():
        return None
    assert name is not None
    return LearnedTokenizer(name, JsonTokenizer.read(path))


def learned_of(tokenizer: Tokenizer) -> LearnedTokenizer | None:
    """The learnt tokenizer that this one is, or extends; None: it is another one."""
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    return base if isinstance(base, LearnedTokenizer) else None


def text_of(tokenizer: Tokenizer, tokens: Tokens) -> npt.NDArray[np.uint8]:
    """The bytes of a stream of tokens, with a byte 0 for each end-of-text."""
    if not isinstance(tokenizer, LearnedTokenizer):
        return tokens.astype(np.uint8)
    pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    pieces[tokenizer.end_of_text] = b"\0"
    return np.frombuffer(b"".join(map(pieces.__getitem__, tokens.tolist())), np.uint8)
