"""data.tokenizer=bpe:SIZE: a vocabulary learnt from the training text alone, exact, and kept with the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rwkv_train.checkpoint.name import checkpoints_below
from rwkv_train.cli import launcher
from rwkv_train.cli.main import main as cli
from rwkv_train.data import learned
from rwkv_train.data.bits_per_byte import token_bytes
from rwkv_train.data.learned import LearnedTokenizer, learn, learned_size, text_of
from rwkv_train.data.tokenizers import JsonTokenizer
from rwkv_train.errors import UserError
from rwkv_train.inference.loading import tokenizer_of
from rwkv_train.training.run import train
from tests.runs import overrides_for

TEXTS = [f"def f{n}(x):\n    return x + {n}  # häppy 😀\n".encode() * 3 for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> LearnedTokenizer:
    return learn("bpe:300", TEXTS)


def test_the_same_texts_give_the_same_vocabulary(tokenizer: LearnedTokenizer) -> None:
    assert learn("bpe:300", TEXTS).content == tokenizer.content
    assert learn("bpe:300", TEXTS[:20]).content != tokenizer.content
    assert tokenizer.vocab_size == learn("bpe:300", [b"a"]).vocab_size == 300  # of which the last are unused


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS[:2],
        b"",
        b"\xff",
        b"caf\xe9 \xed\xa0\x80\xff\xfe\n",
        bytes(range(256)),
        b"<|endoftext|>",
        "\ufffd".encode(),
    ],
)
def test_every_text_is_encoded_without_loss(tokenizer: LearnedTokenizer, text: bytes) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.end_of_text not in tokens
    assert token_bytes(tokenizer)[tokens].sum() == len(text)
    (together,) = tokenizer.encode_all([text])
    assert np.array_equal(together, tokens)
    stream = np.concatenate(([tokenizer.end_of_text], tokens))
    assert text_of(tokenizer, stream).tobytes() == b"\0" + text


def test_it_is_byte_pair_encoding(tokenizer: LearnedTokenizer) -> None:
    assert len(tokenizer.encode(TEXTS[0])) < 0.4 * len(TEXTS[0])
    assert tokenizer.decode(tokenizer.encode(b" return")[:1]) == b" return"


@pytest.mark.parametrize("name", ["bpe:", "bpe:256", "bpe:65537", "bpe:2k", "bpe:-5", "bpe:²"])
def test_sizes_that_are_none(name: str) -> None:
    with pytest.raises(UserError, match=r"is no size of a vocabulary\n  give 257 to 65536 tokens"):
        learned_size(name)


@pytest.mark.parametrize("name", [None, "bytes", "world", "bpe.json"])
def test_other_names_ask_for_none(name: str | None) -> None:
    assert learned_size(name) is None


def test_a_run_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed, evaluated and exported with the tokenizer of its directory, and never with one learnt anew."""
    steps = ("data.tokenizer=bpe:300", "validation.every.steps=4", "checkpoint.every.steps=4")
    assert train(launcher.load(overrides_for(tmp_path, "run", *steps, "budget.steps=4"))) == 0
    printed = capsys.readouterr().out
    run = tmp_path / "runs" / "run"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"│ this run             │ {last['val/bits_per_byte'] * math.log(2):.3f}" in printed
    assert "│ lzma" in printed

    monkeypatch.setattr(learned, "learn", None)
    monkeypatch.setattr("rwkv_train.data.sources.learn", None)
    resumed = overrides_for(tmp_path, "run", *steps, "budget.steps=5", "run.allow_changes=true")
    assert train(launcher.load(resumed)) == 0
    assert "resumed from" in capsys.readouterr().out

    checkpoints = checkpoints_below(run)
    for path in (run, run / "weights.pth", *checkpoints):
        assert tokenizer_of(path, 300).identity == JsonTokenizer(str(run / "tokenizer.json")).identity
    assert cli(["eval", str(checkpoints[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all"]["bits_per_byte"] == pytest.approx(last["val/bits_per_byte"], 1e-5)

    assert cli(["export", str(run), str(tmp_path / "out.pth")]) == 0
    assert tokenizer_of(tmp_path / "out.pth", 300).decode([299]) == tokenizer_of(run, 300).decode([299])
    (run / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"was trained with the tokenizer json:.*, which is not found"):
        tokenizer_of(run, 300)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = overrides_for(tmp_path, "run", "data.tokenizer=bpe:300")
    for extra, message in (
        ("init.weights=x.pth", "data.tokenizer=bpe:300 is learnt anew, and init.weights=x.pth knows other tokens"),
        ("model.vocab_size=299", "model.vocab_size=299 is smaller than the 300 tokens of data.tokenizer=bpe:300"),
        ("data.source=chat", "data.tokenizer=bpe:300 is learnt from plain text, and not from data=chat"),
    ):
        assert launcher.main([*text, extra]) == 2
        assert message in capsys.readouterr().err
