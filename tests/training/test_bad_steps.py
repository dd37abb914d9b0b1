"""Bad steps are detected, reported, skipped or rewound, and the run finishes."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_train.checkpoint.shards import Reader
from rwkv_train.cli import launcher
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.training import setup
from rwkv_train.training.callbacks.bad_steps import _superfluous
from rwkv_train.training.replay import replayed
from rwkv_train.training.run import train
from rwkv_train.training.step_verdict import Window
from tests.runs import losses, overrides_for, rows, same_weights, train_ranks, write_text

FAULTS = ["packages=[tests]", "+callbacks.fault._target_=tests.training.faults.Fault"]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows(run, "events.jsonl") if row["event"] == kind]


def poisoned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of a run whose text has one letter with a NaN in its row of the embedding."""
    text = write_text(folder / "text.txt").read_text()
    (folder / "poison.txt").write_text(text[:9000] + "Q" + text[9000:])
    assert train(launcher.load(overrides_for(folder, "first", "budget.steps=1"))) == 0
    weights = torch.load(folder / "runs" / "first" / "weights.pth")
    weights["emb.weight"][ord("Q")] = math.nan
    torch.save(weights, folder / "poisoned.pth")
    monkeypatch.setattr(setup, "Reader", lambda path, finite: Reader(path))  # which would refuse the NaN
    overrides = overrides_for(
        folder, "run", f"init.weights={folder / 'poisoned.pth'}", f"data.path={folder / 'poison.txt'}"
    )
    return [*(override for override in overrides if not override.startswith("model.")), "data.hold_out=0"]


def test_a_poisoned_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that reads it is skipped and named; its replay file repeats it, and names the tensor."""
    overrides = [*poisoned(tmp_path, monkeypatch), "budget.steps=250", "checkpoint.every.steps=40", "health.rewinds=0"]
    assert train(launcher.load(overrides)) == 0
    run = tmp_path / "runs" / "run"
    found = events(run, "bad_step")
    assert found, "no step has read the sample"
    assert (found[0]["kind"], found[0]["layer"], found[0]["tensor"]) == ("nonfinite", 0, "blocks.0: wkv state")
    assert len(found[0]["samples"]) == 1
    logged = rows(run)
    assert [row["step"] for row in logged] == list(range(1, 251))
    bad = [row for row in logged if row["train/loss"] is None]
    assert [row["step"] for row in bad] == [event["step"] for event in found]
    assert logged[-1]["skipped"] == len(bad)
    assert all(math.isfinite(row["train/loss"]) for row in logged if row not in bad)
    printed = capsys.readouterr().out
    assert "ALERT step" in printed
    assert "is not finite\n  sample " in printed
    file = run / "replay" / f"step_{found[0]['step']:09d}.json"
    assert "Q" in json.loads(file.read_text())["samples"][0]["text"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    assert train(launcher.load([f"replay={file}"])) == 0
    printed = capsys.readouterr().out
    assert "replay  the first that is not finite: the weights of emb.weight" in printed
    assert "the output of emb (4, 32, 32): " in printed
    assert f"in rows [{found[0]['samples'][0]}] of the pass" in printed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before | {
        run / "replay": (run / "replay").stat().st_mtime_ns
    }


def test_a_skipped_step_changes_nothing(tmp_path: Path) -> None:
    """Resumed before it and after it, the run is bit-equal; Adam has taken one step fewer."""
    more = [*FAULTS, "+callbacks.fault.steps=[13]", "budget.steps=30"]
    assert train(launcher.load(overrides_for(tmp_path, "whole", *more))) == 0
    whole = tmp_path / "runs" / "whole"
    assert [row["step"] for row in rows(whole) if row["train/loss"] is None] == [13]
    assert events(whole, "bad_step")[0]["tensor"] == "blocks.1: channel mix's input"
    cut = tmp_path / "runs" / "cut"
    for step in (10, 20):  # before it and after it
        checkpoint = whole / "checkpoints" / f"step_{step:09d}-0001"
        shutil.rmtree(cut, ignore_errors=True)
        assert train(launcher.load(overrides_for(tmp_path, "cut", *more, f"resume={checkpoint}"))) == 0
        for key in ("train/loss", "grad_norm", "skipped"):
            assert [row[key] for row in rows(cut)] == [row[key] for row in rows(whole)[step:]]
        assert same_weights(cut, whole)
    meta = json.loads((whole / "checkpoints" / "step_000000030-0001" / "meta.json").read_text())
    assert (meta["step"], meta["updates"]) == (30, 29)


@pytest.mark.parametrize("kind", ["activation", "gradient"])
def test_three_in_a_row_rewind(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Back to the checkpoint of step 10, past the data of steps 10 to 16; no step is recorded twice."""
    more = [*FAULTS, "+callbacks.fault.steps=[15,16,17]", f"+callbacks.fault.kind={kind}", "budget.steps=30"]
    assert train(launcher.load(overrides_for(tmp_path, "run", *more))) == 0
    run = tmp_path / "runs" / "run"
    assert len(losses(run)) == 30
    assert None not in losses(run)
    (found,) = events(run, "rewound")
    assert (found["step"], found["reached"], found["passed_over"]) == (10, 17, 7)
    assert [event["step"] for event in events(run, "bad_step")] == [15, 16, 17]
    assert "rewound to step_000000010-0001; the data of 7 steps are passed over" in capsys.readouterr().out
    assert json.loads((run / "passed_over.json").read_text()) == {"rewinds": 1, "skipped": [[1280, 896]]}
    file = run / "replay" / "step_000000015.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "skipped": [[1280, 896]]}))  # as after a rewind
    with replayed(launcher.load([f"replay={file}"]), True) as config:
        assert RunDirectory(config.run.root, config.run.name).read_passed_over().skipped == ((1280, 896),)
    # without a fault, resumed from that checkpoint: the data that is passed over is all that differs
    clean = overrides_for(tmp_path, "clean", "budget.steps=30")
    assert train(launcher.load(clean)) == 0
    other = tmp_path / "runs" / "clean"
    assert losses(other)[:10] == losses(run)[:10]
    assert losses(other)[10] != losses(run)[10]
    (other / "passed_over.json").write_text(json.dumps({"rewinds": 1, "skipped": [[1280, 896]]}))
    assert train(launcher.load([*clean, f"resume={other / 'checkpoints' / 'step_000000010-0001'}"])) == 0
    assert losses(other) == losses(run)
    assert same_weights(other, run)


def test_the_checkpoints_for_replays_are_chosen_by_name(tmp_path: Path) -> None:
    """By attempt and step: a clock that has stepped back makes no difference, and the one just made stays."""
    names = ["step_000000500-0001", "step_000000900-0001", "step_000000100-0002", "step_000000050-0002"]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 - number, 1e9 - number))
    (tmp_path / ".again_step_000000051").mkdir()
    (tmp_path / "step_000000051.json").touch()
    assert [path.name for path in _superfluous(tmp_path, tmp_path / names[3])] == ["step_000000500-0001"]
    assert [path.name for path in _superfluous(tmp_path, tmp_path / names[0])] == ["step_000000900-0001"]
    assert [path.name for path in _superfluous(tmp_path, tmp_path / "step_000000040-0003")] == names[:2]


def test_no_way_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first checkpoint, and where the policy is to stop: exit code 5, and the last step is kept."""
    for name, more in {"early": ["+callbacks.fault.steps=[2,3,4]"], "stop": ["+callbacks.fault.steps=[12]"]}.items():
        policy = ["health.nonfinite=stop"] if name == "stop" else []
        overrides = overrides_for(tmp_path, name, *FAULTS, *more, *policy, "budget.steps=30")
        assert train(launcher.load(overrides)) == 5
        run = tmp_path / "runs" / name
        step = {"early": 4, "stop": 12}[name]
        assert [row["step"] for row in rows(run)] == list(range(1, step + 1))
        why = {"early": "there is no checkpoint to go back to", "stop": "a bad step, and the policy is to stop"}[name]
        assert events(run, "unhealthy")[0]["reason"] == why
        assert f"stopped at step {step}: {why}; the same command resumes from" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["alert", "skip", "rewind"])
def test_a_spike(tmp_path: Path, policy: str) -> None:
    """All weights three times as large after step 30: the loss of step 31 is a spike."""
    more = [*FAULTS, "+callbacks.fault.steps=[30]", "+callbacks.fault.kind=rate", "budget.steps=40"]
    health = [f"health.spike={policy}", "health.window=16", "health.patience=2"]
    assert train(launcher.load(overrides_for(tmp_path, "run", *more, *health))) == 0
    run = tmp_path / "runs" / "run"
    assert len(losses(run)) == 40
    found = events(run, "bad_step")
    assert (found[0]["step"], found[0]["kind"]) == (31, "spike")
    assert bool(events(run, "rewound")) == (policy != "alert")
    if policy != "alert":
        assert max(losses(run)[20:]) < 4  # the steps after the checkpoint are undone


def test_the_window() -> None:
    window = Window(20, 10.0)
    draw = random.Random(1)
    for _ in range(9):
        window.add(2.0 + draw.gauss(0, 0.05))
    assert window.limit() == math.inf
    window.add(2.0)
    assert 2.2 < window.limit() < 2.0 + 10 * 0.2
    before = window.limit()
    window.add(1e9)  # one spike moves neither the median nor the deviation much
    assert window.limit() < before + 0.5
    window.add(None)
    assert len(window.losses) == 11
    flat = Window(16, 10.0, [1.0] * 16)
    assert flat.limit() == pytest.approx(1.1)


@pytest.mark.parametrize(
    "strategy",
    ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "deepspeed_2", "deepspeed_3"))],
)
def test_one_rank_of_two(tmp_path: Path, strategy: str) -> None:
    """A gradient that is infinite on one rank only: both ranks skip and rewind, and neither waits for the other."""
    more = [
        *FAULTS,
        "+callbacks.fault.steps=[6,12,13,14]",
        "+callbacks.fault.kind=gradient",
        "+callbacks.fault.rank=1",
    ]
    if strategy.startswith("deepspeed"):
        more[-2] = "+callbacks.fault.kind=activation"  # its engine has taken the gradients away by then
    train_ranks(overrides_for(tmp_path, "run", *more, f"strategy={strategy}", "budget.steps=20"), 2)
    run = tmp_path / "runs" / "run"
    assert len(losses(run)) == 20
    found = events(run, "bad_step")
    assert [event["step"] for event in found] == [6, 12, 13, 14]
    if strategy == "ddp":
        assert found[0]["tensor"] == "gradient of blocks.1.ffn.key.weight on rank 1"
    assert [(event["step"], event["reached"]) for event in events(run, "rewound")] == [(10, 14)]
    assert rows(run)[-1]["skipped"] == 1
    assert [row["step"] for row in rows(run) if row["grad_norm"] is None] == [6]
