"""One validation: the same rows, loss and bits per byte in training on every layout, by `eval`, and counted by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_train.cli import launcher
from rwkv_train.cli import main as cli
from rwkv_train.config.clock import TokenClock
from rwkv_train.config.mesh import Mesh
from rwkv_train.data.batch import Batch
from rwkv_train.data.batches import Batches
from rwkv_train.data.bits_per_byte import bits_per_byte
from rwkv_train.data.corpus import read_corpus
from rwkv_train.data.rows import IGNORED_TARGET
from rwkv_train.errors import UserError
from rwkv_train.evaluation.eval_command import EvalOptions, run
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.setup import RunSetup, assemble
from rwkv_train.training.step_verdict import StepVerdict
from rwkv_train.training.validation_sums import ValidationResult, ValidationSums
from tests.checkpoint.metas import meta_of
from tests.data.made_tokenizers import byte_level
from tests.data.test_indexed import ours
from tests.runs import overrides_for

FRAGMENTS = ("ka", "lomi", "ruté", "the", "我能", "sa no", "vi. ", "😀", "user", "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of text as files, as conversations, as lines and as a store, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    texts = [" ".join(FRAGMENTS[(n * n + i * i * (n + 1)) % 10] for i in range(10 + 7 * (n % 5))) for n in range(40)]
    for side, part in (("a", texts[:25]), ("b", texts[25:])):
        (folder / side).mkdir()
        for number, text in enumerate(part):
            (folder / side / f"{number:02}.txt").write_text(text)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chats = [[{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text}] for text in texts]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    ours(folder / "store", [[*text.encode(), 0] for text in texts])
    byte_level(folder)
    return folder


PACKED, RESET = "data.documents=packed", "data.reset=true"
TEXT = ("data=text", "data.path={}/a", "data.hold_out=0.4", "data.tokenizer=bytes")
STORE = ("data=store", "data.path={}/store", "data.hold_out=0.3", "data.tokenizer=bytes")
PARTS = "data.sources=[{{name:a,path:{0}/store,weight:1,epochs:null}},{{name:b,path:{0}/b,weight:2,epochs:null}}]"
MIXTURE = ("data=mixture", "data.tokenizer=bytes", "data.hold_out=0.3", PARTS)
CHAT = ("data=chat", "data.path={}/chat.jsonl", "data.hold_out=0.3", "data.tokenizer=bytes")
KINDS = {
    "text": TEXT,
    "text packed": (*TEXT, PACKED),
    "text reset": (*TEXT, PACKED, RESET),
    "world": (*TEXT, "data.tokenizer=world"),
    "bpe": (*TEXT, "data.tokenizer={}/byte_level.json"),
    "bpe reset": (*TEXT, "data.tokenizer={}/byte_level.json", PACKED, RESET),
    "extended": (*TEXT, "vocab.extend=[lomi,user]"),
    "store": STORE,
    "store packed": (*STORE, PACKED),
    "store reset": (*STORE, PACKED, RESET),
    "mixture": MIXTURE,
    "mixture packed": (*MIXTURE, PACKED),
    "mixture reset": (*MIXTURE, PACKED, RESET),
    "chat": (*CHAT, "data.reset=false"),
    "chat reset": CHAT,
    "stream": (
        "data=stream",
        "data.path={}/lines.jsonl",
        "data.tokenizer=bytes",
        "data.workers=0",
        "data.held_out_documents=9",
        "data.hold_out=0.3",
    ),
}
LIMITED = ("text", "chat reset", "mixture packed")  # kinds that are validated on some of the rows as well


def set_up(folder: Path, kind: str, *more: str) -> RunSetup:
    """A run of that kind of data, with weights under which every token has another probability."""
    given = [override.format(folder) for override in KINDS[kind]]
    given += ["batch.tokens=256", "validation.context=64", "trainer.precision=32-true", *more]
    named = {override.split("=")[0] for override in given} | {"data.path"}
    plain = [override for override in overrides_for(folder) if override.split("=")[0] not in named]
    last = {override.split("=")[0]: override for override in given}
    setup = assemble(launcher.load([*plain, *last.values()]))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in setup.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return setup


CLOCK = TokenClock.resumed((), 0, 256)


def module_of(setup: RunSetup) -> RWKVModule:
    data = setup.data
    names = [data.sources[number].name for number in data.validated]
    table = torch.from_numpy(data.token_bytes)
    return RWKVModule(setup.model, setup.recipe, setup.config.optim, 1, CLOCK, sources=names, token_bytes=table)


@torch.no_grad()
def validated(setup: RunSetup, data: Batches, ranks: int = 1) -> tuple[ValidationResult, list[Batch]]:
    """What training finds with the batches of all ranks, and these batches."""
    module, batches = module_of(setup), []
    for rank in range(ranks):
        data.rank = rank
        for number, source in enumerate(data.validated):
            for index, batch in enumerate(data.validation(source)):
                module.validation_step(batch, index, number)
                batches.append(batch)
    return module.validation_sums.result(lambda sums: sums, 0), batches


def bytes_of(batches: Sequence[Batch], data: Batches) -> int:
    """Bytes of the texts of all targets, decoded one by one; 1 for an end-of-text."""
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    tokens, end = targets[targets != IGNORED_TARGET].tolist(), data.tokenizer.end_of_text
    return sum(1 if token == end else len(data.tokenizer.decode([token])) for token in tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_is_the_validation_of_the_run(
    folder: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss, tokens and bits per byte, also where validation.batches is set; bytes are those of the targets."""
    for more in ((), ("validation.batches=2",)) if kind in LIMITED else ((),):
        setup = set_up(folder, kind, *more)
        found, batches = validated(setup, setup.data)
        tokens = sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in batches)
        nats = found.loss * tokens
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / bytes_of(batches, setup.data), rel=1e-6)
        assert abs(found.loss - math.log(setup.model.config.vocab_size)) > 1e-3, "some tokens are likelier than others"

        evaluated = evaluate(setup, tmp_path, capsys)
        assert evaluated["all"]["tokens"] == tokens
        assert evaluated["all"]["nats_per_token"] == pytest.approx(found.loss, rel=1e-6)
        assert evaluated["all"]["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-6)
        by_source = {row["name"]: row["nats_per_token"] for row in evaluated["sources"]}
        assert found.by_source == (pytest.approx(by_source, rel=1e-6) if len(by_source) > 1 else {})
        assert evaluated["all"]["tokens"] < evaluated["all"]["of_tokens"] or not more


def save(setup: RunSetup, path: Path, **fields: Any) -> str:
    """Weights, and the description of a checkpoint of the run beside them."""
    torch.save(setup.model.state_dict(), path / "weights.pth")
    checkpoint = path / "checkpoints" / "step_000000001-0001"
    checkpoint.mkdir(parents=True, exist_ok=True)
    described = {"config": setup.tree, "data": setup.data.digest, "tokenizer": setup.data.tokenizer.identity}
    (checkpoint / "meta.json").write_text(json.dumps(meta_of(**{**described, **fields}).as_json()))
    return str(path / "weights.pth")


def evaluate(setup: RunSetup, path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    capsys.readouterr()
    assert cli.main(["eval", save(setup, path), "--json", "--device", "cpu", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_bytes_of_texts_and_conversations_by_hand(folder: Path) -> None:
    """The held-out text itself, an end-of-text before each document but the first; the assistant's text and its end."""
    for kind in ("text", "text reset", "world", "bpe", "bpe reset", "extended"):
        setup = set_up(folder, kind)
        documents = read_corpus(setup.config.data).held_out
        _, batches = validated(setup, setup.data)
        text = sum(len(document.text) for document in documents)
        assert counted(batches, setup.data) == text + len(documents) - 1, kind
    setup = set_up(folder, "chat reset")
    _, batches = validated(setup, setup.data)
    held_out = [rows.store for rows in setup.data.held_out_rows.rows]  # type: ignore[attr-defined]
    starts, lengths = held_out[0].documents()
    written = bytes(held_out[0].tokens)
    answers = [
        written[start : start + length].split(b"Assistant: ")[1]
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]
    assert len(answers) > 5
    assert all(answer.endswith(b"\n\n\0") for answer in answers)
    assert counted(batches, setup.data) == sum(map(len, answers))


def counted(batches: Sequence[Batch], data: Batches) -> int:
    """Bytes of the targets by the table of the run."""
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    return int(data.token_bytes[targets[targets != IGNORED_TARGET].numpy()].sum())


@pytest.mark.parametrize("kind", ["bpe", "text packed", "chat", "mixture reset"])
def test_bits_per_byte_of_a_training_step(folder: Path, kind: str) -> None:
    """The bytes are those of the step's own targets, over all micro-batches, whatever was held out."""
    setup = set_up(folder, kind, "batch.micro=2")
    data, verdict = setup.data, StepVerdict()
    table = torch.from_numpy(data.token_bytes)
    module = RWKVModule(setup.model, setup.recipe, setup.config.optim, 1, CLOCK, token_bytes=table)
    batches = [data.batch(3, index) for index in range(data.accumulation)]
    verdict.begin_step(torch.device("cpu"))
    module.verdict = verdict
    module.statistics.due = False
    losses = [float(module.training_step(batch, index).detach()) for index, batch in enumerate(batches)]
    verdict.judge(torch.tensor(1.0))
    assert len(losses) == 4
    assert verdict.loss is not None
    assert verdict.text is not None
    tokens, text_bytes = verdict.text.tolist()
    assert tokens == sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in batches)
    assert text_bytes == bytes_of(batches, data)
    with torch.no_grad():
        for batch in batches:
            module.validation_step(batch, 0)
    found = module.validation_sums.result(lambda sums: sums, 0)
    assert bits_per_byte(float(verdict.loss) * tokens, text_bytes) == pytest.approx(found.bits_per_byte, rel=1e-5)


def data_of(setup: RunSetup, ranks: int, micro: int) -> Batches:
    config = setup.config
    data = Batches(
        config.data,
        config.batch,
        config.seed,
        Mesh(ranks),
        config.validation.batches,
        config.validation.context,
        config.vocab.extend,
    )
    data.share_out(micro)
    return data


@pytest.mark.parametrize("kind", LIMITED)
def test_a_limited_validation_is_the_same_on_every_layout(folder: Path, kind: str) -> None:
    setup = set_up(folder, kind, "validation.batches=2")
    chosen = [numbers.tolist() for numbers in setup.data.held_out_rows.chosen]
    assert sum(map(len, chosen)) <= 2 * 256 // 64, "so many batches of batch.tokens, over all ranks and sources"
    assert all(chosen)
    assert any(
        len(numbers) < rows.per_epoch for numbers, rows in zip(chosen, setup.data.held_out_rows.rows, strict=True)
    )
    expected = validated(setup, setup.data)[0]
    for ranks in (1, 2):
        for micro in (1, 2, 4):
            data = data_of(setup, ranks, micro)
            assert (data.micro, data.accumulation) == (micro, 8 // ranks // micro)
            found, batches = validated(setup, data, ranks)
            read = sorted(
                (int(s), n) for batch in batches for s, n in zip(batch.sources, batch.samples.tolist(), strict=True)
            )
            real = [(s, n) for s, n in read if n < data.held_out_rows.rows[s].per_epoch]
            assert real == [(s, n) for s, numbers in enumerate(chosen) for n in numbers], "each row once, and no other"
            assert found.loss == pytest.approx(expected.loss, rel=1e-6)
            assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)
            assert found.by_source == pytest.approx(expected.by_source, rel=1e-6)


def test_other_data_than_the_run_was_validated_on_is_refused(folder: Path, tmp_path: Path) -> None:
    setup = set_up(folder, "text reset")
    weights = save(setup, tmp_path, data="0123456789abcdef")
    with pytest.raises(UserError) as error:
        run(EvalOptions(weights))
    assert f"the data of the run of {weights} has changed: content hash 0123456789abcdef → {setup.data.digest}" in str(
        error.value
    )
    assert "restore the data; or give the data to evaluate on, --data PATH" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "limit", "most"),
    [("text", 10, 10), ("text", 130, 128), ("text reset", 10, 10), ("chat reset", 40, 40), ("mixture", 64, 2 * 64)],
)
def test_no_more_tokens_than_asked_for(
    folder: Path, kind: str, limit: int, most: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Less than a row is the beginning of one; else complete rows."""
    setup = set_up(folder, kind, "validation.batches=1")
    found = evaluate(setup, tmp_path, capsys, "--tokens", str(limit))["all"]
    assert found["tokens"] <= most
    assert found["tokens"] == most or kind.endswith("reset")
    assert found["tokens"] > 0
    assert found["of_tokens"] > most


def test_a_position_is_counted_from_the_start_of_the_document(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = set_up(folder, "text reset")
    found = evaluate(setup, tmp_path, capsys)["all"]
    documents = len(read_corpus(setup.config.data).held_out)
    first, second = found["by_position"][:2]
    assert (first["from"], first["to"]) == (1, 1)
    assert first["tokens"] == second["tokens"] >= documents > 1


def test_without_a_predicted_token_there_is_no_loss() -> None:
    sums = ValidationSums(["a", "b"])
    sums.add(0, torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    sums.add(1, torch.tensor(6.0).double(), torch.tensor([3.0, 4.0]).double())
    found = sums.result(lambda one_rank: one_rank, 7)
    assert math.isnan(found.by_source["a"])
    assert (found.step, found.loss, found.by_source["b"]) == (7, 2.0, 2.0)
    assert found.bits_per_byte == pytest.approx(6 / math.log(2) / 4)
