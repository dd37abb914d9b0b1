"""Loggers and callbacks with _target_: found, allowed and bound to their arguments before the first is created."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import Logger

from rwkv_train.cli import launcher
from rwkv_train.errors import UserErrors
from rwkv_train.instantiate import prepare
from rwkv_train.trackers import LocalTracker, TrackedRun, Tracker
from rwkv_train.trackers.csv_table import CSV
from rwkv_train.trackers.follow import make
from rwkv_train.trackers.lightning import LightningTracker
from rwkv_train.trackers.tensorboard import TensorBoard
from rwkv_train.trackers.wandb import Wandb
from tests.runs import ROOT

STOPPING = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "patience": 2}


def test_every_logger_of_conf(tmp_path: Path) -> None:
    kinds = {"none": [], "csv": [CSV], "tensorboard": [TensorBoard], "wandb": [Wandb]}
    assert kinds.keys() == {path.stem for path in (ROOT / "conf" / "logger").glob("*.yaml")}
    for choice, expected in kinds.items():
        config = launcher.load([f"logger={choice}", f"run.root={tmp_path}"])
        kind = (Tracker, LocalTracker, Logger)
        makers: list[Callable[[], Any]] = prepare("logger", config.logger, kind, config.packages)
        made = [make() for make in makers]
        assert [type(logger) for logger in made] == expected


def test_lightnings_own_logger(tmp_path: Path) -> None:
    tree = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}
    tracker = make("mine", tree, [])
    assert isinstance(tracker, LightningTracker)
    assert tracker.begin(TrackedRun(tmp_path, "run", {"config": {"seed": 1}}), 0) == 0
    tracker.row({"step": 3, "train/loss": 2.0, "layers/x": [1.0, None]})
    tracker.flush()
    tracker.end()
    (file,) = tmp_path.rglob("metrics.csv")
    assert file.read_text().splitlines() == ["layers/x/00,step,train/loss", "1.0,3,2.0"]
    with pytest.raises(UserErrors, match="is not a Logger"):
        make("mine", {"_target_": "lightning.pytorch.callbacks.Callback"}, [])


def test_a_callback() -> None:
    (make,) = prepare("callbacks", {"stop": STOPPING}, Callback)
    stop = make()
    assert isinstance(stop, EarlyStopping)
    assert (stop.monitor, stop.patience) == ("val/loss", 2)


LIGHTNING = "lightning.pytorch.callbacks"
UNPICKLER = {"_target_": "lightning.fabric.utilities.cloud_io._load", "weights_only": False}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"monitor": "x"}, "callbacks.a has no _target_"),
        (
            {"_target_": f"{LIGHTNING}.EarlyStoping"},
            "has no EarlyStoping.*nearest: lightning.pytorch.callbacks.EarlyStopping",
        ),
        ({"_target_": "lightning.pytorch.nowhere.X"}, "cannot be imported"),
        ({"_target_": "os.system", "command": "x"}, "the package os is not allowed.*packages=\\[os\\]"),
        (
            {"_target_": "lightning.pytorch.trainer.connectors.signal_connector.subprocess.call"},
            "cannot be imported|allowed",
        ),
        ({"_target_": "lightning.pytorch.callbacks.early_stopping.torch"}, "early_stopping.torch is not a class"),
        ({"_target_": "lightning.pytorch.callbacks.early_stopping.Tensor"}, "is defined in torch"),
        ({"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "x"}, "is not a Callback"),
        (
            {**STOPPING, "patince": 3},
            "unexpected keyword argument 'patince'.*nearest: patience; valid: monitor, ",
        ),
        ({"_target_": STOPPING["_target_"]}, "missing a required argument: 'monitor'"),
        ({**STOPPING, "_partial_": True}, "of Hydra's keys only _target_ is supported"),
        ({**UNPICKLER, "path_or_url": "x"}, "_load is not a class"),
        ({**STOPPING, "monitor": {**UNPICKLER, "path_or_url": "x"}}, "annotation of monitor in EarlyStopping names no"),
    ],
)
def test_a_tree_that_is_wrong(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserErrors) as caught:
        prepare("callbacks", {"a": tree, "b": STOPPING}, Callback)
    (problem,) = caught.value.problems
    assert re.search(message, str(problem), re.DOTALL), problem
    assert len(str(problem).splitlines()) <= 2


def test_nothing_is_built_before_all_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Mine(Callback):
        def __init__(self, inner: Callback | None = None) -> None:
            made.append("mine")
            self.inner = inner

    room = types.ModuleType("mine")
    Mine.__module__ = "mine"
    room.Mine = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", room)
    trees = {
        "a": {"_target_": "mine.Mine", "inner": STOPPING},
        "b": {"_target_": "mine.Mine", "x": 1},
        "c": {"_target_": "mine.No"},
    }
    with pytest.raises(UserErrors) as caught:
        prepare("callbacks", trees, Callback, ["mine"])
    assert len(caught.value.problems) == 2
    assert made == []
    (make,) = prepare("callbacks", {"a": trees["a"]}, Callback, ["mine"])
    assert made == []
    callback = make()
    assert made == ["mine"]
    assert isinstance(callback, Mine)
    assert isinstance(callback.inner, EarlyStopping)
    with pytest.raises(UserErrors, match="the package mine is not allowed"):
        prepare("callbacks", {"a": trees["a"]}, Callback)


class Outer(Callback):
    def __init__(self, inner: Callback | dict[str, Any] | None = None, plain: str = "", **others: Any) -> None:
        self.inner = inner


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "x"}}, "is not a Callback"),
        ({"inner": {**UNPICKLER, "path_or_url": "x"}}, "_load is not a class"),
        (
            {"plain": STOPPING},
            "the annotation of plain in Outer names no class\n  give callbacks.a.plain a plain value",
        ),
        ({"no_such": STOPPING}, "the annotation of no_such in Outer names no class"),
    ],
)
def test_an_object_inside_an_object_is_of_the_kind_that_its_annotation_names(
    arguments: dict[str, Any], message: str
) -> None:
    tree = {"_target_": "tests.test_instantiate.Outer", **arguments}
    with pytest.raises(UserErrors, match=message):
        prepare("callbacks", {"a": tree}, Callback, ["tests"])
