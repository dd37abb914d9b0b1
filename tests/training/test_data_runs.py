"""Runs on stores, mixtures, chats and streams: what a checkpoint remembers of its data, and exact resumes."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rwkv_train.checkpoint.shards import WEIGHT, Reader, StateShard
from rwkv_train.cli import launcher
from rwkv_train.data.batch import Batch
from rwkv_train.data.datamodule import DataModule
from rwkv_train.data.prepare import PrepareOptions, prepare
from rwkv_train.errors import UserError
from rwkv_train.models import ModelConfig, build_model
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows, same_weights, write_text

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def run(folder: Path, name: str, *more: str) -> Path:
    overrides = [
        override for override in overrides_for(folder, name) if not override.startswith(("data=", "data.path="))
    ]
    given = {override.split("=")[0] for override in more}
    assert (
        train(launcher.load([*(override for override in overrides if override.split("=")[0] not in given), *more])) == 0
    )
    return folder / "runs" / name


SHORT_RUN = ("budget.steps=8", "validation.every.steps=4", "checkpoint.every.steps=4")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    text = write_text(tmp_path / "text.txt").read_text()
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": part}) + "\n" for part in text.split(". ") if part.strip())
    )
    prepare(PrepareOptions((str(tmp_path / "a.jsonl"),), "bytes", tmp_path / "s"))
    return tmp_path / "s"


def stopped_and_resumed(folder: Path, *more: str) -> None:
    whole = run(folder, "whole", *SHORT_RUN, *more)
    run(folder, "parts", *SHORT_RUN, "budget.steps=5", *more, "optim.schedule.shape=constant")
    assert len(losses(folder / "runs" / "parts")) == 5
    constant = run(folder, "constant", *SHORT_RUN, *more, "optim.schedule.shape=constant")
    parts = run(folder, "parts", *SHORT_RUN, *more, "optim.schedule.shape=constant", "run.allow_changes=true")
    assert losses(parts) == losses(constant)
    assert same_weights(parts, constant)
    assert losses(whole)[0] == losses(constant)[0]


def test_a_run_on_a_store_resumes_exactly(store: Path, tmp_path: Path) -> None:
    stopped_and_resumed(tmp_path, "data=store", f"data.path={store}", "data.hold_out=0.1")


def test_a_stream_resumes_exactly_from_its_position(store: Path, tmp_path: Path) -> None:
    overrides = ("data=stream", f"data.path={tmp_path}/a.jsonl", "data.tokenizer=bytes", "data.workers=0")
    stopped_and_resumed(tmp_path, *overrides, "data.held_out_documents=5")
    (checkpoint,) = (tmp_path / "runs" / "parts" / "checkpoints").glob("*8-*")
    meta = json.loads((checkpoint / "meta.json").read_text())
    assert meta["position"]["offset"] <= 8 * 128
    assert meta["tokenizer"] == "bytes"


def test_a_stream_that_a_thread_reads_ahead_is_rewound_and_saved(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a GPU: losses, positions and probes are those of a run without the thread."""
    stream = ("data=stream", f"data.path={tmp_path}/a.jsonl", "data.tokenizer=bytes", "data.workers=0")
    fault = (
        "packages=[tests]",
        "+callbacks.fault._target_=tests.training.faults.Fault",
        "+callbacks.fault.steps=[4,5,6]",
    )
    more = (*SHORT_RUN, "checkpoint.every.steps=3", "checkpoint.keep=9", "batch.micro=2", *stream, *fault)
    plain = run(tmp_path, "plain", *more, "data.held_out_documents=5")
    setup = DataModule.setup

    def ahead(data: DataModule, stage: str) -> None:
        setup(data, stage)
        data.batches.pinned = True

    monkeypatch.setattr(DataModule, "setup", ahead)
    monkeypatch.setattr(Batch, "pin", lambda batch: batch)
    threaded = run(tmp_path, "threaded", *more, "data.held_out_documents=5")
    assert losses(threaded) == losses(plain)
    rewound = [(row["step"], row["reached"]) for row in rows(threaded, "events.jsonl") if row["event"] == "rewound"]
    assert rewound == [(3, 6)]
    saved = sorted(path.name for path in (plain / "checkpoints").glob("step_*"))
    assert len(saved) > 2
    for name in saved:
        metas = [json.loads((each / "checkpoints" / name / "meta.json").read_text()) for each in (plain, threaded)]
        for key in ("position", "probe", "probe_sample", "data_tokens"):
            assert metas[0][key] == metas[1][key]
    assert not any(thread.name == "batches" for thread in threading.enumerate())


def test_another_store_or_tokenizer_under_the_same_name_is_refused(store: Path, tmp_path: Path) -> None:
    overrides = ("data=store", f"data.path={store}", "data.hold_out=0.1")
    run(tmp_path, "run", *SHORT_RUN, *overrides)
    kept = {file.name: file.read_bytes() for file in tmp_path.glob("s.*")}
    tokens = np.fromfile(tmp_path / "s.bin", np.uint16)
    tokens[100:200] = ord("x")
    tokens.tofile(tmp_path / "s.bin")
    with pytest.raises(UserError, match=r"s.bin does not match its manifest s.json: fingerprint"):
        run(tmp_path, "run", *SHORT_RUN, *overrides, "budget.steps=9", "run.allow_changes=true")
    (tmp_path / "s.json").unlink()
    with pytest.raises(UserError, match=r"the data itself: content hash \w+ → \w+\n  to resume all the same"):
        run(tmp_path, "run", *SHORT_RUN, *overrides, "data.tokenizer=bytes")
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"was made with the tokenizer bytes, the run's is world:\w+\n  remove data"):
        run(tmp_path, "run", *SHORT_RUN, *overrides, "data.tokenizer=world")
    shutil.rmtree(tmp_path / "runs")
    for file in tmp_path.glob("s.*"):
        file.unlink()
    with pytest.raises(UserError, match=r"there is no store s\.bin and s\.idx"):
        run(tmp_path, "run", *SHORT_RUN, *overrides)


def test_a_mixture_reports_each_source(store: Path, tmp_path: Path) -> None:
    sources = f"data.sources=[{{name:a,path:{store},weight:0.75}},{{name:b,path:{tmp_path}/text.txt,weight:0.25}}]"
    found = rows(run(tmp_path, "run", *SHORT_RUN, "data=mixture", sources, "data.hold_out=0.1"))
    assert found[-1]["tokens/a"] == 8 * 128 * 3 // 4
    assert found[-1]["tokens/b"] == 8 * 128 // 4
    assert found[-1]["val/loss/a"] != found[-1]["val/loss/b"]
    assert (
        min(found[-1][f"val/loss/{n}"] for n in "ab")
        < found[-1]["val/loss"]
        < max(found[-1][f"val/loss/{n}"] for n in "ab")
    )
    with pytest.raises(UserError, match=r"sources may be read for \d+ steps .* the budget is 8,000 steps"):
        run(tmp_path, "short", *SHORT_RUN, "data=mixture", sources.replace("}", ",epochs:1}"), "budget.steps=8000")


def test_a_chat_is_shown_before_step_0_and_its_loss_falls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": messages, "n": n}) + "\n" for n in range(60)))
    overrides = ("data=chat", f"data.path={tmp_path}/chat.jsonl", "data.tokenizer=bytes", "data.hold_out=0")
    found = losses(run(tmp_path, "run", *SHORT_RUN, *overrides, "budget.steps=30"))
    printed = capsys.readouterr().out
    assert "▌User: ?" in printed
    assert "tokens with a loss" in printed
    assert found[-1] < 0.7 * found[0]


def test_new_tokens_leave_old_logits(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt")
    overrides = ("data=text", f"data.path={tmp_path}/text.txt", "data.hold_out=0")
    weights = run(tmp_path, "old", *SHORT_RUN, *overrides) / "weights.pth"
    grown = run(
        tmp_path,
        "new",
        *SHORT_RUN,
        *overrides,
        f"init.weights={weights}",
        "vocab.extend=[<|user|>,lomi]",
        "budget.steps=1",
    )
    after = torch.load(grown / "weights.pth", weights_only=True)
    assert after["emb.weight"].shape[0] == after["head.weight"].shape[0] == 258
    before = torch.load(weights, weights_only=True)
    old, new = build_model(ModelConfig("rwkv4", 2, 32, 256)), build_model(ModelConfig("rwkv4", 2, 32, 258))
    old.load_state_dict(before)
    reader = Reader(weights)
    reader.grow_vocabulary(2)
    reader.fill(StateShard(WEIGHT, name, 0, p.detach().view(-1), True) for name, p in new.named_parameters())
    for name in ("emb.weight", "head.weight"):
        mean = before[name].double().mean(0).float()
        assert torch.equal(new.state_dict()[name][256:], mean.expand(2, -1))
    tokens = torch.randint(256, (2, 20))
    torch.testing.assert_close(new(tokens)[0][..., :256], old(tokens)[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(new.emb.weight[:256], old.emb.weight)
