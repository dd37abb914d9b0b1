"""Tokenizers: RWKV World against PyPI rwkv's own, tokenizer.json files, additional tokens, files for transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.tokenizers import load_tokenizer, tokenizer_note
from rwkv_train.errors import UserError
from rwkv_train.inference.tokenizer_files import tokenizer_files
from tests.data import made_tokenizers

TEXTS = {
    "languages": "The quick brown fox. Съешь ещё этих булок. 我能吞下玻璃而不伤身体。 いろはに أهلا שלום नमस्ते ไทย",
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈 é e\u0301 ﬀ \u200d\ufeff 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "code": Path(__file__).read_text(encoding="utf-8"),
    "blanks": "\n\n\n\t\t  \r\n \x00\x01 \x7f" * 7,
    "nothing": "",
}


@pytest.fixture(scope="module")
def original() -> Any:
    """PyPI rwkv's tokenizer, in plain Python."""
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    spec = find_spec("rwkv")
    assert spec is not None
    assert spec.origin is not None
    return TRIE_TOKENIZER(str(Path(spec.origin).with_name("rwkv_vocab_v20230424.txt")))


@pytest.mark.parametrize("name", TEXTS)
def test_world_is_the_original(original: Any, name: str) -> None:
    world, text = load_tokenizer("world"), TEXTS[name].encode()
    tokens = world.encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == original.encodeBytes(text)
    assert world.decode(tokens) == text


def test_world_takes_any_bytes(original: Any) -> None:
    world, noise = load_tokenizer("world"), np.random.default_rng(0)
    for size in (1, 2, 3, 10, 100, 1000, 5000):
        text = noise.integers(0, 256, size, dtype=np.uint8).tobytes()
        assert world.encode(text).tolist() == original.encodeBytes(text)
        assert world.decode(world.encode(text)) == text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(max_size=200))
def test_world_encodes_and_decodes_any_text(text: str) -> None:
    world = load_tokenizer("world")
    assert world.decode(world.encode(text.encode())) == text.encode()


def test_world_has_the_models_vocabulary() -> None:
    world = load_tokenizer("world")
    assert (world.vocab_size, world.end_of_text, world.decode([0])) == (65536, 0, b"")
    assert world.identity.startswith("world:")


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with GPT-NeoX-20B's layout: byte-level BPE, <|endoftext|> is 0, blanks are added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<|padding|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXTS["code"], TEXTS["languages"]], trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=False) for n in (8, 4, 2)])
    path = tmp_path_factory.mktemp("tokenizers") / "neox.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("name", ["languages", "code", "nothing"])
def test_a_tokenizer_json(neox: Path, name: str) -> None:
    from tokenizers import Tokenizer

    ours, text = load_tokenizer(str(neox)), TEXTS[name].encode()
    tokens = ours.encode(text)
    assert tokens.tolist() == Tokenizer.from_file(str(neox)).encode(TEXTS[name]).ids
    assert ours.decode(tokens) == text
    assert b"".join(ours.decode([token]) for token in tokens) == text, "token by token, though characters are cut"
    assert (ours.end_of_text, ours.vocab_size) == (0, 603)
    assert tokens.dtype == np.uint16
    assert ours.identity.startswith("json:")


def test_truncation_and_padding_of_a_tokenizer_json_are_not_obeyed(neox: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    text = TEXTS["languages"].encode()
    whole = load_tokenizer(str(neox)).encode(text).tolist()
    saved = Tokenizer.from_file(str(neox))
    saved.enable_truncation(16)
    saved.enable_padding(length=128)
    saved.save(str(tmp_path / "both.json"))
    both = load_tokenizer(str(tmp_path / "both.json"), ["<new>"])
    assert both.encode(text).tolist() == whole
    assert both.encode(b"a").size == 1
    assert tokenizer_note(both).endswith(
        "both.json asks for truncation and padding of each text, which is switched off"
    )
    assert tokenizer_note(load_tokenizer(str(neox))) == tokenizer_note(load_tokenizer("bytes")) == ""


@pytest.mark.parametrize("kind", [made_tokenizers.metaspace, made_tokenizers.t5, made_tokenizers.bert])
def test_blanks_between_tokens_of_an_extended_vocabulary(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    text = b"dog and dog<|user|>hello dog"
    extended = load_tokenizer(str(kind(tmp_path)), ["<|user|>"])
    assert extended.decode(extended.encode(text)) == text


def test_error_messages_of_tokenizer_files(tmp_path: Path, neox: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"x.json is not a tokenizer.json: .*\n.*bytes, world, bpe:SIZE .*, or the path"
    ):
        load_tokenizer(str(tmp_path / "x.json"))
    with pytest.raises(UserError, match=r"gone\.json cannot be read: No such file"):
        load_tokenizer(str(tmp_path / "gone.json"))
    (tmp_path / "x.json").write_text(neox.read_text().replace("<|endoftext|>", "<|nothing|>"))
    with pytest.raises(UserError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path / "x.json"))


@pytest.mark.parametrize("base", ["bytes", "world"])
def test_additional_tokens(base: str) -> None:
    extra = ["<|user|>", "<|user|>x", "日本"]
    plain, grown = load_tokenizer(base), load_tokenizer(base, extra)
    text = "a <|user|>x<|user|> 日本 日 b".encode()
    tokens = grown.encode(text)
    assert grown.decode(tokens) == text
    first = plain.vocab_size
    assert [token - first for token in tokens.tolist() if token >= first] == [1, 0, 2]
    assert grown.vocab_size == first + 3
    assert tokens.dtype == (np.uint16 if base == "bytes" else np.int32)
    assert grown.encode(b"nothing new").tolist() == plain.encode(b"nothing new").tolist()
    assert grown.encode(b"").size == 0
    assert grown.identity != load_tokenizer(base, extra[:2]).identity
    assert grown.identity.split("+")[0] == plain.identity
    for wrong in (["a", "a"], [""]):
        with pytest.raises(UserError, match="has an empty or a repeated token"):
            load_tokenizer(base, wrong)


def test_no_tokenizer_is_imported_before_it_is_needed() -> None:
    import subprocess

    check = "import sys, rwkv_train.data; print('tokenizers' in sys.modules, 'pyrwkv_tokenizer' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


HUB_TEXTS = ["", "def f(x):\n\treturn  x\n", "déf 你好 \0 z", "Ā Ġ <|endoftext|>", "n't 's .  , ", "\r\n\x7f\xa0\xad"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> object:
    """ByteTokenizer as transformers loads it from our files."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bytes")
    for name, content in tokenizer_files(load_tokenizer("bytes")).items():
        (folder / name).write_text(content)
    (folder / "config.json").write_text('{"model_type": "rwkv"}')
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", HUB_TEXTS)
def test_bytes_are_bytes_in_transformers(loaded: object, text: str) -> None:
    assert loaded.encode(text) == list(text.encode())  # type: ignore[attr-defined]
    assert loaded.decode(loaded.encode(text)) == text  # type: ignore[attr-defined]
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (0, 0, 256)  # type: ignore[attr-defined, arg-type]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_is_bytes_in_transformers(loaded: object, text: str) -> None:
    assert loaded.encode(text) == list(text.encode())  # type: ignore[attr-defined]


def test_a_tokenizer_json_is_exported_unchanged(neox: Path) -> None:
    files = tokenizer_files(load_tokenizer(str(neox)))
    assert files["tokenizer.json"] == neox.read_text()
    assert '"eos_token": "<|endoftext|>"' in files["tokenizer_config.json"]
    assert tokenizer_files(load_tokenizer("world")) == {}
    assert tokenizer_files(load_tokenizer("bytes", ["<new>"])) == {}
