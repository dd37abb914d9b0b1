"""What transformers makes of our tokenizers' files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.tokenizer_json import tokenizer_files
from rwkv_train.data.tokenizers import load_tokenizer
from tests.data.test_tokenizers import neox  # noqa: F401  a fixture

TEXTS = ["", "def f(x):\n\treturn  x\n", "déf 你好 \0 z", "Ā Ġ <|endoftext|>", "n't 's .  , ", "\r\n\x7f\xa0\xad"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> object:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bytes")
    for name, content in tokenizer_files(load_tokenizer("bytes")).items():
        (folder / name).write_text(content)
    (folder / "config.json").write_text('{"model_type": "rwkv"}')
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_bytes_in_transformers(loaded: object, text: str) -> None:
    assert loaded.encode(text) == list(text.encode())  # type: ignore[attr-defined]
    assert loaded.decode(loaded.encode(text)) == text  # type: ignore[attr-defined]
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (0, 0, 256)  # type: ignore[attr-defined, arg-type]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text(loaded: object, text: str) -> None:
    assert loaded.encode(text) == list(text.encode())  # type: ignore[attr-defined]


def test_a_tokenizer_json_is_taken_as_it_is(neox: Path) -> None:  # noqa: F811
    files = tokenizer_files(load_tokenizer(str(neox)))
    assert files["tokenizer.json"] == neox.read_text()
    assert '"eos_token": "<|endoftext|>"' in files["tokenizer_config.json"]
    assert tokenizer_files(load_tokenizer("world")) == {}
    assert tokenizer_files(load_tokenizer("bytes", ["<new>"])) == {}
