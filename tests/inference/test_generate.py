"""Generation step by step: the same as the parallel mode, repeatable, from any file of ours."""

from pathlib import Path

import pytest
import torch

from rwkv_train.errors import UserError
from rwkv_train.inference.generate import generate, load_model, run, sample
from rwkv_train.models import ModelConfig, build_model
from tests.oracles.models import lively_model


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


def test_top_p_and_temperature() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_p: float) -> torch.Tensor:
        drawn = [sample(probabilities.log(), temperature, top_p, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    assert shares(1.0, 1.0).numpy() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(1.0, 0.7).numpy() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(1.0, 0.4).tolist() == [1, 0, 0, 0]  # the likeliest always stays
    assert shares(0.0, 1.0).tolist() == [1, 0, 0, 0]
    sharp = probabilities**2 / (probabilities**2).sum()
    assert shares(0.5, 1.0).numpy() == pytest.approx(sharp.numpy(), abs=0.03)


def test_the_command_streams_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(lively_model(vocab_size=256).state_dict(), tmp_path / "ours.pth")
    assert run(str(tmp_path / "ours.pth"), "déf ", 1.0, 0.9, 40, 3) == 0
    first = capsys.readouterr().out
    assert first.startswith("déf ")
    assert len(first) > 20
    assert run(str(tmp_path / "ours.pth"), "déf ", 1.0, 0.9, 40, 3) == 0
    assert capsys.readouterr().out == first


def test_mistakes(tmp_path: Path) -> None:
    torch.save(lively_model(vocab_size=40).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="vocabulary of 40 tokens"):
        run(str(tmp_path / "other.pth"), "", 1.0, 1.0, 1, None)
    with pytest.raises(UserError, match="there is no file"):
        run(str(tmp_path / "nothing.pth"), "", 1.0, 1.0, 1, None)
    (tmp_path / "torn.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read as weights"):
        run(str(tmp_path / "torn.pth"), "", 1.0, 1.0, 1, None)
    torch.save({"x.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="does not hold an RWKV model's weights"):
        load_model(tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="out of range"):
        run(str(tmp_path / "other.pth"), "", 1.0, 0.0, 1, None)


def test_the_tokenizer_is_found_by_the_vocabulary_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def save(vocab_size: int) -> str:
        torch.save(build_model(ModelConfig("rwkv4", 1, 8, vocab_size)).state_dict(), tmp_path / "m.pth")
        return str(tmp_path / "m.pth")

    assert run(save(65536), "你好", 1.0, 0.9, 3, 0) == 0
    assert capsys.readouterr().out.startswith("你好")
    with pytest.raises(UserError, match=r"has a vocabulary of 300 tokens\n  --tokenizer names the one"):
        run(save(300), "x", 1.0, 0.9, 3, 0)
    assert run(save(300), "x", 1.0, 0.9, 3, 0, "bytes") == 0
    with pytest.raises(UserError, match=r"of 300 tokens, the tokenizer world 65,536"):
        run(save(300), "x", 1.0, 0.9, 3, 0, "world")
