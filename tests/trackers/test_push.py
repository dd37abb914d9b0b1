"""`report RUN --push TRACKER`: a run's rows are sent again, and nothing that its directory names is run."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rwkv_train.cli import launcher
from rwkv_train.cli import main as cli
from rwkv_train.errors import UserError
from rwkv_train.trackers import flat, launch
from rwkv_train.trackers.launch import push
from rwkv_train.training.run import train
from tests.runs import ROOT, overrides_for, rows
from tests.trackers.readers import add, tensorboard_rows, wandb_rows


def test_push(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without a tracker is handed to one from its files."""
    assert train(launcher.load(overrides_for(tmp_path, "run", "budget.steps=8", "statistics.every.steps=4"))) == 0
    run = tmp_path / "runs" / "run"
    tree = {"_target_": "rwkv_train.trackers.wandb.Wandb", "mode": "offline"}
    state = push(run, "wandb", tree)
    assert state["sent"] == 8
    truth = {row["step"]: dict(flat(row)) for row in rows(run)}
    end, sent = time.monotonic() + 30, dict[int, dict[str, Any]]()
    while len(sent) < len(truth) and time.monotonic() < end:  # W&B's own process writes the file, a moment later
        sent = {step: row for (name, step), row in wandb_rows(run).items() if name == state["id"]}
        time.sleep(0.1)
    assert {s: {k: v for k, v in row.items() if not k.startswith("_")} for s, row in sent.items()} == truth
    assert cli.main(["report", str(run), "--push", "csv"]) == 0
    with open(run / "metrics.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 9))
    assert f"{run}: 8 steps in csv\n" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path), "--push", "wandb"]) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no metrics\.jsonl with a row"):
        push(tmp_path / "empty", "wandb", tree)


def stranger(folder: Path, logger: object) -> Path:
    """A run directory as a stranger may send it, with this `logger` in its config.yaml."""
    run = folder / "run"
    run.mkdir()
    add(run / "metrics.jsonl", {"step": 1, "time": 1e9, "train/loss": 2.0})
    (run / "config.yaml").write_text(json.dumps({"logger": logger}))
    return run


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_push_runs_no_code_of_a_run_directory(tmp_path: Path) -> None:
    marker, pickled, mine = tmp_path / "ran", tmp_path / "evil.pt", tmp_path / ".bashrc"
    torch.save(Evil(marker), pickled)
    mine.write_text("mine")
    load = {"_target_": "lightning.fabric.utilities.cloud_io._load", "path_or_url": str(pickled), "weights_only": False}
    for number, path in enumerate([load, str(mine), None]):
        (folder := tmp_path / str(number)).mkdir()
        run = stranger(folder, {"csv": {"_target_": "os.system", "path": path}})
        (run / ".metrics.csv").symlink_to(mine)
        assert cli.main(["report", str(run), "--push", "csv"]) == 0
        assert (run / "metrics.csv").read_text().splitlines()[0] == "step,time,train/loss"
    assert not marker.exists()
    assert mine.read_text() == "mine"
    (folder := tmp_path / "board").mkdir()
    run = stranger(folder, {"tensorboard": {"directory": str(tmp_path / "elsewhere")}})
    assert cli.main(["report", str(run), "--push", "tensorboard"]) == 0
    assert tensorboard_rows(run).keys() == {1}
    assert not (tmp_path / "elsewhere").exists()


def test_push_takes_plain_text_of_a_fixed_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []

    def push(path: Path, name: str, tree: Any) -> dict[str, Any]:
        pushed.append(tree)
        return {"sent": 1}

    monkeypatch.setattr(launch, "push", push)
    monkeypatch.setenv("SECRET", "s3cret")
    own = {
        "project": "mine",
        "group": {"_target_": "x"},
        "tags": ["a", "b"],
        "notes": "${oc.env:SECRET}",
        "name": ["x"],
    }
    more = {"_target_": "os.system", "entity": "stranger", "mode": "online", "artifacts": "weights", "other": 1}
    loggers = [{"wandb": {**own, **more}}, {"wandb": 1}, [], None, {"wandb": {"tags": "a", "project": True}}]
    for number, logger in enumerate(loggers):
        (folder := tmp_path / str(number)).mkdir()
        assert cli.main(["report", str(stranger(folder, logger)), "--push", "wandb"]) == 0
    default = yaml.safe_load((ROOT / "conf" / "logger" / "wandb.yaml").read_text())["wandb"]
    assert pushed == [{**default, "project": "mine", "tags": ["a", "b"]}, default, default, default, default]
