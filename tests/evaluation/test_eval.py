"""`rwkv-train eval`: its figures against the model's logits, and its error messages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rwkv_train.cli import launcher
from rwkv_train.cli import main as cli
from rwkv_train.data.indexed import IndexedStore, write_index
from rwkv_train.data.manifest import Manifest, write_manifest
from rwkv_train.data.store import MemoryStore
from rwkv_train.data.tokenizers import ByteTokenizer, load_tokenizer
from rwkv_train.errors import UserError
from rwkv_train.evaluation import scoring
from rwkv_train.evaluation.eval_command import EvalOptions, run
from rwkv_train.evaluation.perplexity import combine, measure
from rwkv_train.models import LanguageModel, ModelConfig, build_model
from rwkv_train.training.run import train
from tests.checkpoint.metas import meta_of
from tests.data.test_indexed import ours
from tests.oracles.models import lively_model
from tests.runs import overrides_for, rows

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return lively_model(vocab_size=256).eval()


def nats_of(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of each token but the first (N - 1), by the definition."""
    with torch.no_grad():
        logits, _ = model(tokens[None, :-1])
    return F.cross_entropy(logits[0], tokens[1:], reduction="none").double()


@pytest.mark.parametrize(("length", "context", "batch"), [(101, 10, 3), (96, 50, 1), (7, 50, 4), (65, 64, 4)])
def test_every_token_is_predicted_once(
    model: LanguageModel, length: int, context: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 256 * 7)  # the head goes over them in parts
    text = torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(length))
    text[::20] = 0  # ends of text
    result = measure(model, BYTES, "x", MemoryStore(text.numpy()), context, batch)
    parts = [nats_of(model, text[begin : begin + context + 1]) for begin in range(0, length - 1, context)]
    positions = [sum(float(part[position]) for part in parts if len(part) > position) for position in range(context)]
    assert result.positions == pytest.approx(np.array(positions), rel=1e-5)
    assert result.counts.tolist() == [sum(len(part) > position for part in parts) for position in range(context)]
    assert (result.tokens, result.available, result.bytes) == (length - 1, length - 1, length - 1)
    figures = result.as_json()
    mean = float(torch.cat(parts).mean())
    assert figures["nats_per_token"] == pytest.approx(mean, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-5)
    bins = figures["by_position"]
    assert [row["from"] for row in bins] == [1, *(row["to"] + 1 for row in bins[:-1])]
    assert sum(row["tokens"] for row in bins) == length - 1
    assert sum(row["tokens"] * row["nats_per_token"] for row in bins) == pytest.approx(result.nats)
    assert [(row["from"], row["to"]) for row in bins[:4]] == [(1, 1), (2, 2), (3, 4), (5, 8)][: len(bins)]


def test_a_limit_takes_windows_from_the_whole_store(model: LanguageModel) -> None:
    text = np.repeat(np.arange(1, 11, dtype=np.uint8), 100)
    part = measure(model, BYTES, "x", MemoryStore(text), 10, 4, limit=95)
    assert (part.tokens, part.available) == (90, 999)
    whole = measure(model, BYTES, "y", MemoryStore(text), 10, 4)
    both = combine([part, whole])
    assert (both.name, both.tokens, both.nats) == ("all", 90 + 999, part.nats + whole.nats)
    assert both.positions.tolist() == (part.positions + whole.positions).tolist()


def test_the_loss_by_position_shows_whether_the_context_is_used() -> None:
    """A model that cannot mix over time has the same loss at every position; one that does has not."""
    blind = lively_model(vocab_size=256)
    with torch.no_grad():
        for name, parameter in blind.named_parameters():
            if "att.output.weight" in name or "time_mix" in name:
                parameter.fill_(float("time_mix" in name))  # nothing of the token before
    draw = np.random.default_rng(0)
    text = np.tile(draw.integers(1, 256, 64, dtype=np.uint8), 64)

    def spread(model: LanguageModel) -> float:
        """Between the second and the last bin, in windows that begin equally often at each offset of the pattern."""
        bins = measure(model, BYTES, "x", MemoryStore(text), 63, 65).as_json()["by_position"]
        return float(bins[1]["nats_per_token"] - bins[-1]["nats_per_token"])

    assert abs(spread(blind)) < 0.02
    assert abs(spread(lively_model(vocab_size=256))) > 0.02


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    every = [f"{setting}.steps=20" for setting in ("budget", "validation.every", "checkpoint.every")]
    overrides = overrides_for(folder, "run", *every, "validation.context=32")
    assert train(launcher.load(overrides)) == 0
    return folder / "runs" / "run"


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.main(["eval", *arguments, "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("which", ["weights.pth", "checkpoints/step_*"])
def test_without_data_it_is_the_validation_of_the_run(
    trained: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(capsys, str(*trained.glob(which)))
    assert found["context"] == 32
    assert (found["tokenizer"], found["step"]) == ("bytes", 20)
    assert found["model"] == {"arch": "rwkv4", "n_layer": 2, "n_embd": 32, "vocab_size": 256}
    assert found["all"]["nats_per_token"] == pytest.approx(rows(trained)[-1]["val/loss"], rel=1e-6)
    assert found["all"]["bits_per_byte"] == pytest.approx(rows(trained)[-1]["val/bits_per_byte"], rel=1e-6)


def test_text_stores_and_names(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("ka lo mi ru te sa no vi pu de " * 30)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.txt").write_text("xyzzy " * 50)
    tokens = np.frombuffer(b"ka lo mi " * 20, np.uint8)
    tokens.tofile(tmp_path / "three.bin")
    write_index(tmp_path / "three.idx", np.uint8, lambda: iter([np.array([len(tokens)], np.int32)]))
    paths = [str(tmp_path / "one.txt"), f"other={tmp_path / 'two'}", str(tmp_path / "three")]
    arguments = [argument for path in paths for argument in ("--data", path)]
    found = evaluate(capsys, str(trained / "weights.pth"), *arguments, "--tokenizer", "bytes", "--context", "16")
    assert [source["name"] for source in found["sources"]] == ["one", "other", "three"]
    assert [source["tokens"] for source in found["sources"]] == [900, 300, 179]
    assert found["sources"][0]["nats_per_token"] < found["sources"][1]["nats_per_token"]
    assert found["all"]["tokens"] == 1379

    out = tmp_path / "eval.json"
    assert cli.main(["eval", str(trained / "weights.pth"), *arguments, "--tokens", "64", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "64 of 900" in shown
    assert "17 – 32" in shown
    assert json.loads(out.read_text())["all"]["tokens"] == 3 * 64
    batches = [
        evaluate(capsys, str(trained / "weights.pth"), *arguments, "--batch", batch)["all"]["nats_per_token"]
        for batch in ("1", "16")
    ]
    assert batches[0] == pytest.approx(batches[1], rel=1e-6)


def refused(options: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        run(EvalOptions(**options))
    return str(error.value)


def test_error_messages(trained: Path, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = str(trained / "weights.pth")
    for name, value, valid in (("context", 0, 1), ("batch", 0, 1), ("tokens", 0, 1), ("limit", 0, 1), ("shots", -1, 0)):
        message = refused({"checkpoint": checkpoint, name: value})
        assert message == f"--{name} {value} is out of range\n  valid: {valid} or more"
    assert refused({"checkpoint": checkpoint, "max_length": 1}).startswith("--max-length 1 is out of range")
    assert refused({"checkpoint": checkpoint, "context": 10**14}).startswith(
        "--context 100000000000000 is out of range"
    )
    assert "there is no such store or text" in refused({"checkpoint": checkpoint, "data": ["nowhere.txt"]})
    assert "its directory does not exist" in refused({"checkpoint": checkpoint, "out": str(tmp_path / "no" / "x.json")})
    (tmp_path / "a.txt").write_text("x" * 9)
    twice = refused({"checkpoint": checkpoint, "data": [str(tmp_path / "a.txt")] * 2})
    assert "there are two sources named a\n  name them: --data NAME=PATH" in twice
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    message = refused({"checkpoint": str(tmp_path / "bare.pth")})
    assert "is not found (the checkpoint belongs to no run)\n  give the data to evaluate on" in message
    monkeypatch.setattr("rwkv_train.evaluation.eval_command.find_spec", lambda name: None)
    message = refused({"checkpoint": checkpoint, "tasks": ["x"]})
    assert message == "--tasks needs lm-eval, which is not installed\n  pip install 'rwkv-train[eval]'"


def test_a_mismatched_tokenizer_is_refused(trained: Path, tmp_path: Path) -> None:
    """The checkpoint records its tokenizer; that of a store and --tokenizer must be the same."""
    checkpoint = str(*trained.glob("checkpoints/step_*"))
    message = refused({"checkpoint": checkpoint, "tokenizer": "world"})
    assert "has a vocabulary of 256 tokens, the tokenizer world 65,536" in message
    store = IndexedStore(ours(tmp_path / "store"))
    identity = load_tokenizer("world").identity
    write_manifest(store.stem, Manifest("world", [], identity, 4, len(store), 1, 9, store.fingerprint(), {}, []))
    message = refused({"checkpoint": checkpoint, "data": [str(store.stem)]})
    assert "the store was made with the tokenizer world:" in message
    assert f"{checkpoint} was trained with bytes" in message

    wide = build_model(ModelConfig("rwkv4", 1, 8, 65536))
    newest = tmp_path / "checkpoints" / "step_000000001-0001"
    newest.mkdir(parents=True)
    weights = str(tmp_path / "weights.pth")
    torch.save(wide.state_dict(), weights)
    (newest / "meta.json").write_text(json.dumps(meta_of(tokenizer="json:0123456789ab").as_json()))
    message = refused({"checkpoint": weights, "tokenizer": "world"})
    assert "was trained with the tokenizer json:0123456789ab, --tokenizer world is world:" in message
    assert "would stand for other texts\n  leave --tokenizer out" in message
    message = refused({"checkpoint": weights})
    assert "was trained with the tokenizer json:0123456789ab, which is not found\n  --tokenizer names" in message
