"""Generation step by step: the same as the parallel mode, repeatable, from any file of ours."""

import json
import sys
from pathlib import Path

import pytest
import torch

from rwkv_train.console import visible
from rwkv_train.errors import UserError
from rwkv_train.inference.export import export
from rwkv_train.inference.generate import GenerateOptions, generate, run
from rwkv_train.inference.loading import load_model
from rwkv_train.inference.sampling import Sampling
from rwkv_train.models import ModelConfig, build_model
from tests.oracles.models import lively_model

USUAL_SAMPLING = Sampling(top_p=0.9)


def test_greedy_steps_follow_the_parallel_logits() -> None:
    model = lively_model(vocab_size=40)
    prompt = [3, 1, 4, 1, 5]
    tokens = list(generate(model, prompt, 30, temperature=0))
    with torch.no_grad():
        logits, _ = model(torch.tensor([prompt + tokens]))
    assert tokens == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def test_long_prompts_are_read_in_parts() -> None:
    model = lively_model(vocab_size=40)
    prompt = torch.randint(40, (2500,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        logits, _ = model(torch.tensor([prompt]))
    assert next(generate(model, prompt, 1, temperature=0)) == int(logits[0, -1].argmax())


def test_a_seed_repeats() -> None:
    model = lively_model(vocab_size=40)
    first, again, other = (list(generate(model, [1], 50, 1.0, 0.9, seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_the_command_streams_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(lively_model(vocab_size=256).state_dict(), tmp_path / "ours.pth")
    assert run(GenerateOptions(str(tmp_path / "ours.pth"), "déf ", 40, USUAL_SAMPLING, 3)) == 0
    first = capsys.readouterr().out
    assert first.startswith("déf ")
    assert len(first) > 20
    assert run(GenerateOptions(str(tmp_path / "ours.pth"), "déf ", 40, USUAL_SAMPLING, 3)) == 0
    assert capsys.readouterr().out == first


def test_a_terminal_gets_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe gets the text as it is. A model of random weights writes every byte."""
    torch.save(lively_model(vocab_size=256).state_dict(), tmp_path / "ours.pth")
    prompt = "\x1b]0;title\x07"
    for batch in (1, 2):
        options = GenerateOptions(str(tmp_path / "ours.pth"), prompt, 200, Sampling(), 3, batch=batch)
        assert run(options) == 0
        raw = capsys.readouterr().out
        assert prompt in raw
        with monkeypatch.context() as patch:
            patch.setattr(type(sys.stdout), "isatty", lambda self: True)
            assert run(options) == 0
        assert capsys.readouterr().out == visible(raw)


def test_a_terminal_gets_no_control_characters_of_a_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that names the prefix which was removed also names the file."""
    path = tmp_path / "a\x1b[2J.pth"
    torch.save({f"module.{name}": value for name, value in lively_model(vocab_size=40).state_dict().items()}, path)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    load_model(path)
    export(path, tmp_path / "exported.pth")
    said = capsys.readouterr().err
    assert said.count("a\\x1b[2J.pth: ") == 2
    assert "\x1b" not in said


def test_mistakes(tmp_path: Path) -> None:
    torch.save(lively_model(vocab_size=40).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="vocabulary of 40 tokens"):
        run(GenerateOptions(str(tmp_path / "other.pth"), "", 1, USUAL_SAMPLING))
    with pytest.raises(UserError, match="there is no file"):
        run(GenerateOptions(str(tmp_path / "nothing.pth"), "", 1, USUAL_SAMPLING))
    (tmp_path / "torn.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read as weights"):
        run(GenerateOptions(str(tmp_path / "torn.pth"), "", 1, USUAL_SAMPLING))
    torch.save({"x.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="does not hold the weights of a language model"):
        load_model(tmp_path / "foreign.pth")
    for wrong, message in (
        ({"tokens": -1}, "--tokens -1 is out of range"),
        ({"batch": 0}, "--batch 0 is out of range"),
        ({"stops": [""]}, "--stop '' is out of range"),
        (
            {"batch": 10**14},
            r"--batch 10{14} needs about [\d,.]+ GB, [\d,.]+ GB are free\n  --batch \d+, several",
        ),
        ({"batch": 10**30}, "are free"),
        ({"seed": 10**23}, "--seed 1(0){23} is out of range"),
    ):
        options = GenerateOptions(str(tmp_path / "other.pth"), "", **{"tokens": 1, "sampling": USUAL_SAMPLING, **wrong})  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            run(options)
    with pytest.raises(UserError, match="--device cuda: torch can use no GPU here"):
        load_model(tmp_path / "other.pth", "cuda")


def test_the_tokenizer_is_found_by_the_vocabulary_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def save(vocab_size: int) -> str:
        torch.save(build_model(ModelConfig("rwkv4", 1, 8, vocab_size)).state_dict(), tmp_path / "m.pth")
        return str(tmp_path / "m.pth")

    assert run(GenerateOptions(save(65536), "你好", 3, USUAL_SAMPLING, 0)) == 0
    assert capsys.readouterr().out.startswith("你好")
    with pytest.raises(UserError, match=r"has a vocabulary of 300 tokens\n  --tokenizer names the one"):
        run(GenerateOptions(save(300), "x", 3, USUAL_SAMPLING, 0))
    assert run(GenerateOptions(save(300), "x", 3, USUAL_SAMPLING, 0, "bytes")) == 0
    with pytest.raises(UserError, match=r"of 300 tokens, the tokenizer world 65,536"):
        run(GenerateOptions(save(300), "x", 3, USUAL_SAMPLING, 0, "world"))


def test_several_texts_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(lively_model(vocab_size=256).state_dict(), tmp_path / "ours.pth")
    checkpoint = str(tmp_path / "ours.pth")
    assert run(GenerateOptions(checkpoint, "def ", 20, USUAL_SAMPLING, 3, batch=2, as_json=True)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["sampling"] == {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0}
    assert (answer["prompt"], answer["tokenizer"], answer["checkpoint"]) == ("def ", "bytes", checkpoint)
    assert [text["seed"] for text in answer["texts"]] == [3, 4]
    assert all((len(text["tokens"]), text["ended"]) == (20, "length") for text in answer["texts"])
    assert answer["texts"][0]["text"] != answer["texts"][1]["text"]

    assert run(GenerateOptions(checkpoint, "def ", 20, USUAL_SAMPLING, 4)) == 0
    alone = capsys.readouterr().out
    assert alone == f"def {answer['texts'][1]['text']}\n", "the second text is the one that its seed gives alone"
    assert run(GenerateOptions(checkpoint, "def ", 20, USUAL_SAMPLING, 3, batch=2)) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("===== 1 of 2 =====\ndef ")
    assert f"===== 2 of 2 =====\n{alone}" in shown
