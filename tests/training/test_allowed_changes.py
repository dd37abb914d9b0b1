"""run.allow_changes=true: another batch, context, seed, held-out share or other data; the optimiser is kept."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.cli import launcher
from rwkv_train.config.schema import as_tree
from rwkv_train.errors import UserError
from rwkv_train.training.attempt import rate_change
from rwkv_train.training.run import train
from tests.checkpoint.metas import meta_of
from tests.runs import losses, overrides_for, rows, stopped_at, write_text

STEPS = ("budget.tokens=1024", "checkpoint.every.steps=4", "validation.every.steps=100", "optim.schedule.hold.steps=2")
ALLOWED = "run.allow_changes=true"


def overrides(folder: Path, name: str, *more: str) -> list[str]:
    spy = ["packages=[tests]", "+callbacks.rows._target_=tests.training.spies.Rows"]
    found = overrides_for(folder, name, *STEPS, *more, *spy, f"+callbacks.rows.path={folder / name}.rows")
    return [override for override in found if not override.startswith("budget.steps=")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of eight steps of 128 tokens."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(launcher.load(overrides(folder, "whole"))) == 0
    return folder


def test_another_batch_reads_the_same_data_under_the_same_schedule(folder: Path) -> None:
    whole = folder / "runs" / "whole"
    run = stopped_at(whole, 4, "batch")
    with pytest.raises(UserError, match=r"another config: batch.tokens: 128 → 256;"):
        train(launcher.load(overrides(folder, "batch", "batch.tokens=256")))
    assert train(launcher.load(overrides(folder, "batch", "batch.tokens=256", ALLOWED))) == 0
    expected = (folder / "whole.rows").read_text().split()
    assert (folder / "batch.rows").read_text().split() == expected[4 * 4 :]
    found = rows(run)
    assert [row["tokens"] for row in found] == [128, 256, 384, 512, 768, 1024]
    assert [event["tokens"] for event in rows(run, "events.jsonl") if event["event"] == "finished"][1:] == [1024]
    rates = {row["tokens"] - 128: row["lr"] for row in rows(whole)}  # by the tokens before the step
    assert [row["lr"] for row in found[4:]] == [rates[512], rates[768]]
    meta = CheckpointMeta.read(run / "checkpoints" / "step_000000006-0002")
    assert (meta.tokens, meta.data_tokens, meta.updates) == (1024, 1024, 6)
    assert meta.batches == ((0, 128), (4, 256))
    assert meta.tokens_by_source == {"text": 1024}
    # and once more, without a change: the counters are those of the checkpoint
    again = stopped_at(run, 4, "again")
    (again / "logs").mkdir(exist_ok=True)
    (again / "logs" / "crash_rank_0001.txt").write_text("Fatal Python error: Segmentation fault\n\nThread …\n")
    assert train(launcher.load(overrides(folder, "again", "batch.tokens=256", ALLOWED))) == 0
    assert losses(again) == losses(run)
    (crashed,) = (event for event in rows(again, "events.jsonl") if event["event"] == "crashed")
    assert (crashed["rank"], crashed["reason"]) == (1, "Segmentation fault")
    assert [path.name for path in (again / "logs").glob("crash*")] == [crashed["file"]], "this start has not crashed"


CHANGES = {
    "context": ("batch.context=64",),
    "seed": ("seed=2",),
    "hold_out": ("data.hold_out=0.4",),
    "data": ("data.path=OTHER",),
    "rate": ("optim.lr=1e-3",),
    "all": ("batch.context=64", "batch.tokens=256", "seed=2", "data.hold_out=0.4", "data.path=OTHER"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_continues_the_counters(folder: Path, change: str) -> None:
    other = folder / "other.txt"
    write_text(other, 3000)
    more = [override.replace("OTHER", str(other)) for override in CHANGES[change]]
    run = stopped_at(folder / "runs" / "whole", 4, change)
    before = losses(run)[:4]
    assert train(launcher.load(overrides(folder, change, *more, ALLOWED))) == 0
    assert losses(run)[:4] == before
    assert rows(run)[-1]["tokens"] == 1024
    steps = 2 if change == "all" else 4
    assert [row["step"] for row in rows(run)] == list(range(1, 5 + steps))
    meta = CheckpointMeta.read(run / "checkpoints" / f"step_{4 + steps:09d}-0002")
    assert (meta.data_tokens, meta.updates) == (1024, 4 + steps)
    assert max(losses(run)[4:]) < losses(run)[0], "the weights and the moments are kept"


def test_weights_of_another_checkpoint_are_refused_under_any_change(folder: Path) -> None:
    """The probe is measured on the sample of the checkpoint, not on that of the changed data."""
    run = stopped_at(folder / "runs" / "whole", 4, "wrong")
    path = run / "checkpoints" / "step_000000004-0001"
    weights = torch.load(path / "weights.pth", weights_only=True)
    weights["head.weight"] *= 1.001
    torch.save(weights, path / "weights.pth")
    manifest, content = json.loads((path / "manifest.json").read_text()), (path / "weights.pth").read_bytes()
    manifest["files"]["weights.pth"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the loss of the probe sample under the saved weights is"):
        train(launcher.load(overrides(folder, "wrong", "seed=2", "batch.context=64", ALLOWED)))


def test_what_another_budget_does_to_the_learning_rate_is_said() -> None:
    shape = ["optim.schedule.shape=cosine", "optim.schedule.warmup.steps=0", "optim.schedule.hold.steps=0"]
    plain = ["model=nano", "data=text", "data.path=.", "batch.tokens=128", "batch.context=32", *shape]
    config = {n: launcher.load([*plain, "optim.lr=1", "optim.final_lr=0", f"budget.steps={n}"]) for n in (8, 16)}
    meta = meta_of(step=4, batches=((0, 128),), config=as_tree(config[8]))
    rates = [(1 + math.cos(math.pi * 4 / (steps - 1))) / 2 for steps in (8, 16)]
    expected = f"learning rate after step 4: {rates[0]:.3g} under the former budget and schedule, {rates[1]:.3g} under "
    assert rate_change(meta, config[16]) == f"{expected}these"
    assert rate_change(meta, config[8]) == ""
    constant = launcher.load([*plain, "optim.lr=1", "budget.steps=8", "optim.schedule.shape=constant"])
    longer = launcher.load([*plain, "optim.lr=1", "budget.steps=16", "optim.schedule.shape=constant"])
    assert rate_change(meta_of(step=4, batches=((0, 128),), config=as_tree(constant)), longer) == ""
    assert rate_change(meta_of(step=4, config={"model": "of another version"}), longer) == ""
