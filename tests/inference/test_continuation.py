"""Texts continued together are what each would be alone: whatever the batch, the lengths, and what is read before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_train.data.tokenizers import ByteTokenizer, load_tokenizer
from rwkv_train.inference import continuation
from rwkv_train.inference.continuation import Continuation, Prompt, continue_texts, read
from rwkv_train.inference.sampling import Sampling
from rwkv_train.models import LanguageModel
from tests.data import made_tokenizers
from tests.oracles.models import lively_model

BYTES = ByteTokenizer()
PROMPTS = ["a", "def f(", "to be or not to be", "x" * 33, "def g(", "z"]


class Kept:
    """Collects the bytes that are shown."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def __call__(self, number: int, piece: bytes) -> None:
        self.pieces.append(piece)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return lively_model(vocab_size=256).eval()


def encode(*texts: str) -> list[Prompt]:
    return [(BYTES.encode(text.encode()).tolist(), None) for text in texts]


def texts(
    model: LanguageModel, prompts: list[Prompt], sampling: Sampling, first: int = 0, **options: object
) -> list[Continuation]:
    seeds = [first + number for number in range(len(prompts))]
    return continue_texts(model, BYTES, prompts, 40, sampling, seeds, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0.9, 0.95, 50, 1.1)])
def test_a_text_does_not_depend_on_its_batch(model: LanguageModel, sampling: Sampling) -> None:
    together = texts(model, encode(*PROMPTS), sampling)
    alone = [texts(model, encode(prompt), sampling, number)[0] for number, prompt in enumerate(PROMPTS)]
    assert [text.tokens for text in together] == [text.tokens for text in alone]
    assert len({text.text for text in together}) > 3


def test_reading_is_the_parallel_mode_of_each(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuation, "MAX_PROMPT_CHUNK", 7)  # long prompts are read in parts
    with torch.no_grad():
        logits, state = read(model, encode(*PROMPTS))
        for row, (ids, _) in enumerate(encode(*PROMPTS)):
            expected, after = model(torch.tensor([ids]))
            torch.testing.assert_close(logits[row], expected[0, -1], rtol=1e-4, atol=1e-5)
            for found, wanted in zip(state.tensors(), after.tensors(), strict=True):
                torch.testing.assert_close(found[row], wanted[0], rtol=1e-4, atol=1e-5)


def test_prompts_continue_from_a_state(model: LanguageModel) -> None:
    """Rows with a memory and rows of fresh texts in one batch."""
    with torch.no_grad():
        _, before = read(model, encode("to be or "))
    begun: list[Prompt] = [
        (BYTES.encode(b"not").tolist(), before),
        *encode("def f("),
        (BYTES.encode(b"no").tolist(), before),
    ]
    whole = encode("to be or not", "def f(", "to be or no")
    assert [text.text for text in texts(model, begun, Sampling(0))] == [
        text.text for text in texts(model, whole, Sampling(0))
    ]


def test_stop_strings_end_a_text(model: LanguageModel) -> None:
    (plain,) = texts(model, encode("def "), Sampling(0.9), 5)
    for stop in (plain.text[10:13], plain.text[20:21]):
        shown: list[bytes] = []
        stops = [b"\xff\xfe\xfd", stop]
        (ended,) = texts(model, encode("def "), Sampling(0.9), 5, stops=stops, on_text=Kept(shown))
        assert ended.ended == "stop"
        assert ended.text == plain.text[: plain.text.find(stop)]
        assert b"".join(shown) == ended.text, "nothing of a stop string was shown"
    assert plain.ended == "length"
    assert len(plain.text) == 40


class Joined:
    """Decodes tokens as words with blanks between them, as tokenizers of the Metaspace kind do, and counts them."""

    vocab_size, end_of_text, decoded = 256, 0, 0

    def decode(self, tokens: Sequence[int]) -> bytes:
        self.decoded += len(tokens)
        return b" ".join(b"w%d" % token for token in tokens)


@pytest.mark.parametrize("stops", [[], [b"w1000"], [b"w1000", b"never"]])
def test_each_token_is_decoded_a_few_times(model: LanguageModel, stops: list[bytes]) -> None:
    """And the text is what all tokens together give, with its blanks, also as it is shown."""
    shown: list[bytes] = []
    tokenizer: Any = Joined()
    (found,) = continue_texts(
        model, tokenizer, encode("def "), 300, Sampling(0.9), [5], stops, at_end=False, on_text=Kept(shown)
    )
    assert len(found.tokens) == 300
    assert tokenizer.decoded <= 4 * 300
    assert found.text == Joined().decode(found.tokens) == b"".join(shown)


def test_an_incomplete_character_waits_for_its_other_tokens() -> None:
    class Replacing(ByteTokenizer):
        def decode(self, tokens: Any) -> bytes:
            return super().decode(tokens).decode("utf-8", "replace").encode()

    text = "häuser, größer, 森".encode()
    growing = continuation._GrowingText(Replacing(), [b"never"])
    for count in range(1, len(text) + 1):
        growing.grow(list(text[:count]), last=False)
        assert bytes(growing.content) == text[:count].decode("utf-8", "ignore").encode()
    growing.grow([*text, 0xE6], last=True)
    assert bytes(growing.content) == text + "\ufffd".encode()


KINDS = [
    made_tokenizers.byte_level,
    made_tokenizers.byte_level_sequence,
    made_tokenizers.metaspace,
    made_tokenizers.llama,
    made_tokenizers.t5,
    made_tokenizers.bert,
]


@pytest.mark.parametrize("extend", [(), ("<|user|>",)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_streamed_is_the_whole_decoded(
    tmp_path: Path, kind: Callable[[Path], Path], extend: tuple[str, ...]
) -> None:
    """At every step: all that is shown is the beginning of it, and only an incomplete character is still missing."""
    from tokenizers import Tokenizer

    path = str(kind(tmp_path))
    tokenizer = load_tokenizer(path, extend)
    text = "dog and  hello dogs, (a) don't, éàü 数据 😀 it's"
    tokens = tokenizer.encode(text.encode()).tolist()
    whole = Tokenizer.from_file(path).decode(tokens, skip_special_tokens=False).encode()
    assert kind is made_tokenizers.bert or whole == text.encode()
    growing = continuation._GrowingText(tokenizer, [b"never"])
    for count in range(1, len(tokens) + 1):
        growing.grow(tokens[:count], last=count == len(tokens))
        so_far = tokenizer.decode(tokens[:count]).decode(errors="replace").rstrip("\ufffd").encode()
        assert whole.startswith(bytes(growing.content))
        assert len(growing.content) >= len(so_far) or kind is made_tokenizers.llama
    assert bytes(growing.content) == whole
    for split in range(1, len(tokens)):
        if tokenizer.decode(tokens[:split]).decode(errors="replace").endswith("\ufffd"):
            continue
        before = tokenizer.decode(tokens[:split])
        after = continuation._GrowingText(tokenizer, [], tokens[:split])
        after.grow(tokens[split : split + 1], last=False)
        after.grow(tokens[split:], last=True)
        assert before + bytes(after.content) == whole, "after a prompt"


def test_what_could_be_a_stop_string_is_held_back(model: LanguageModel) -> None:
    shown: list[bytes] = []
    (plain,) = texts(model, encode("def "), Sampling(0.9), 5)
    never = plain.text[:3] + b"\xff"
    (again,) = texts(model, encode("def "), Sampling(0.9), 5, stops=[never], on_text=Kept(shown))
    assert shown[:3] == [b"", b"", b""]
    assert b"".join(shown) == again.text == plain.text


def test_an_end_of_text_ends_one_where_it_should(model: LanguageModel) -> None:
    seed = next(seed for seed in range(200) if 0 in texts(model, encode("q"), Sampling(), seed, at_end=False)[0].tokens)
    goes_on, ended = (texts(model, encode("q"), Sampling(), seed, at_end=end)[0] for end in (False, True))
    assert (goes_on.ended, ended.ended) == ("length", "end_of_text")
    assert ended.tokens == goes_on.tokens[: goes_on.tokens.index(0)]


def test_nothing_to_do(model: LanguageModel) -> None:
    assert continue_texts(model, BYTES, [], 5, Sampling(), []) == []
    assert continue_texts(model, BYTES, encode("x"), 0, Sampling(), [0]) == [Continuation()]
