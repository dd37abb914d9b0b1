"""The probe: a sample with a finite loss, compared with the data and recomputed at a resume."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor

from rwkv_train.checkpoint.directory import WITHOUT_FINITE_LOSS, newest_to_resume
from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.retention import Retention
from rwkv_train.checkpoint.storage import LocalStorage
from rwkv_train.checkpoint.writer import InProcessStore, Writer
from rwkv_train.cli import launcher
from rwkv_train.config import BatchSettings, CheckpointSettings, DataSettings, Duration
from rwkv_train.data.batch import Batch
from rwkv_train.data.batches import Batches
from rwkv_train.errors import UserError
from rwkv_train.rundir.attempts import Attempts
from rwkv_train.rundir.jsonl import Events
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback
from rwkv_train.training.probe import CANDIDATES, Probe
from rwkv_train.training.run import train
from tests.checkpoint.metas import meta_of
from tests.runs import losses, overrides_for, rows, stopped_at, write_text

CONTEXT, SAMPLES = 32, 4


def trainer(loss: Callable[[Tensor], float]) -> L.Trainer:
    """What a probe uses of a trainer, whose model has this loss."""
    strategy = SimpleNamespace(
        probe=lambda batch: torch.tensor(loss(batch.tokens), dtype=torch.float64),
        batch_to_device=lambda batch: batch,
        reduce=lambda value, reduce_op: value,
    )
    precision = SimpleNamespace(forward_context=nullcontext)
    return cast(L.Trainer, SimpleNamespace(strategy=strategy, precision_plugin=precision, precision="32-true"))


@pytest.fixture
def data(tmp_path: Path) -> Batches:
    write_text(tmp_path / "text.txt", 400)
    settings = DataSettings("text", str(tmp_path / "text.txt"), "bytes", 0.0)
    return Batches(settings, BatchSettings(SAMPLES * CONTEXT, CONTEXT, None), seed=1)


def bad_in(data: Batches, *numbers: int) -> Callable[[Tensor], float]:
    bad = [data.lone_sample(number).tokens for number in numbers]
    return lambda tokens: math.nan if any(torch.equal(tokens, each) for each in bad) else 2.5


@pytest.mark.parametrize(("bad", "taken"), [((), 8), ((8,), 9), ((8, 9, 10), 11)])
def test_it_is_the_first_sample_of_the_step_whose_loss_is_finite(
    data: Batches, bad: tuple[int, ...], taken: int
) -> None:
    probe = Probe.measure(trainer(bad_in(data, *bad)), data, step=2)
    assert (probe.sample, probe.loss) == (taken, 2.5)
    assert torch.equal(probe.batch.tokens, data.lone_sample(taken).tokens)


def test_a_sample_without_a_prediction_is_passed_over(data: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    lone = data.lone_sample

    def first_ignored(number: int) -> Batch:
        batch = lone(number)
        return batch._replace(targets=torch.full_like(batch.targets, -100)) if number == 8 else batch

    monkeypatch.setattr(data, "lone_sample", first_ignored)
    assert Probe.measure(trainer(lambda _: 0.0), data, step=2).sample == 9


def test_weights_without_a_finite_loss_are_not_saved(
    data: Batches, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Probe.measure(trainer(lambda _: math.inf), data, step=0).loss is None
    settings = CheckpointSettings(Duration(steps=4), 2, None, False, True)
    saving = CheckpointCallback(tmp_path / "checkpoints", settings, 1, data, {}, Events(tmp_path / "events.jsonl"))
    saved: list[Path] = []
    good = True
    run: Any = trainer(lambda _: 2.5 if good else math.nan)
    run.global_step, run.is_global_zero, run.save_checkpoint = 4, True, saved.append
    run.strategy.broadcast = bool
    saving.save(run)
    run.global_step, good = 8, False
    saving.last = 4
    for _ in range(2):
        saving.save(run)
    assert [path.name for path in saved] == ["step_000000004-0000"]
    reason = "the loss of none of the next 8 samples is finite"
    assert capsys.readouterr().err.splitlines() == [
        "",
        f"WARNING: no checkpoint of step 8: {reason}; the last one is of step 4",
    ]
    assert [(row["event"], row["error"]) for row in saving.events.rows()] == [("checkpoint_failed", reason)]


def test_no_run_resumes_from_weights_without_a_finite_loss(tmp_path: Path) -> None:
    """Such checkpoints were written by earlier versions: an older one is used, if there is any."""
    attempts = Attempts(tmp_path)
    attempts.begin(attempts.claim(), 0, None)
    writer = Writer(LocalStorage(), 0, 1, InProcessStore())
    paths = [tmp_path / "checkpoints" / str(CheckpointName(step, 1)) for step in (4, 8, 12)]
    for path, probe in zip(paths, (2.5, None, None), strict=True):
        writer.begin(path, {"part.json": 1}, meta_of(step=CheckpointName.of(path).step, probe=probe))
        writer.wait()
    found, passed_over = newest_to_resume(tmp_path / "checkpoints")
    assert (found, [each.path for each in passed_over]) == (paths[0], [paths[2], paths[1]])
    assert {each.reason for each in passed_over} == {WITHOUT_FINITE_LOSS}
    retention = Retention(tmp_path / "checkpoints", attempts, 1, None, False, LocalStorage())
    assert retention.superfluous(1) == [], "the only one that can be resumed from"
    shutil.rmtree(paths[0])
    with pytest.raises(UserError, match=f"all checkpoints of the run .* are damaged: {paths[2].name}: no sample of"):
        newest_to_resume(tmp_path / "checkpoints")


def test_a_changed_loss_or_a_changed_sample_is_refused(data: Batches) -> None:
    probe = Probe.measure(trainer(lambda _: 2.5), data, step=0)
    probe.compare(data)
    probe.check(trainer(lambda _: 2.5))
    for now in (2.50001, math.nan):
        with pytest.raises(UserError, match=rf"the probe sample under the saved weights is {now}, .* it was 2.5"):
            probe.check(trainer(lambda _, now=now: now))  # type: ignore[misc]
    moved = replace(probe, sample=1)
    with pytest.raises(UserError, match="sample 1 of the data is not what it was at the save"):
        moved.compare(data)
    moved.check(trainer(lambda _: 2.5))  # other data, with leave


def test_the_candidates_end_with_the_data(data: Batches) -> None:
    assert data.probe_samples(3, CANDIDATES) == range(12, 20)
    data.mixture.samples = 18
    assert data.probe_samples(3, CANDIDATES) == range(10, 18)
    data.mixture.samples = 3
    assert data.probe_samples(0, CANDIDATES) == range(3)


def test_a_run_resumes_where_the_next_sample_has_no_finite_loss(tmp_path: Path) -> None:
    """The first sample of the seventh step has the one letter whose row of the embedding is NaN."""
    assert train(launcher.load(overrides_for(tmp_path, "first", "budget.steps=1"))) == 0
    weights = torch.load(tmp_path / "runs" / "first" / "weights.pth")
    weights["emb.weight"][ord("Q")] = torch.tensor([3e38, -3e38]).repeat(16)  # finite; their norm is not
    torch.save(weights, tmp_path / "poisoned.pth")
    text = tmp_path / "text.txt"
    more = [f"init.weights={tmp_path / 'poisoned.pth'}", "data.hold_out=0", "checkpoint.every.steps=6"]
    overrides = [*overrides_for(tmp_path, "run", *more, "budget.steps=12"), "batch.tokens=128"]
    overrides = [override for override in overrides if not override.startswith("model.")]
    config = launcher.load(overrides)
    data = Batches(config.data, config.batch, config.seed)
    text.write_bytes(_with_a_letter(text.read_bytes(), bytes(data.lone_sample(24).tokens[0].tolist()), b"Q"))
    assert train(launcher.load(overrides)) == 0
    whole = tmp_path / "runs" / "run"
    assert [row["step"] for row in rows(whole) if row["train/loss"] is None] == [7]
    path = whole / "checkpoints" / "step_000000006-0001"
    meta = json.loads((path / "meta.json").read_text(), parse_constant=pytest.fail)
    assert meta["probe_sample"] == 25
    assert meta["probe"] == pytest.approx(losses(whole)[5], rel=0.3)
    again = stopped_at(whole, 6, "again")
    assert train(launcher.load([*overrides, "run.name=again"])) == 0
    assert losses(again) == losses(whole)
    assert [event["step"] for event in rows(again, "events.jsonl") if event["event"] == "resumed"] == [6]
    assert CheckpointMeta.read(again / "checkpoints" / "step_000000012-0002").updates == 11


def _with_a_letter(text: bytes, part: bytes, letter: bytes) -> bytes:
    """The text with one letter of a part of it replaced."""
    assert text.count(part) == 1
    place = text.index(part) + len(part) // 2
    return text[:place] + letter + text[place + 1 :]
