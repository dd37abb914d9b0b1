"""Others' classes: found, allowed and their arguments right before the first object is made."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger

from rwkv_train import launcher
from rwkv_train.errors import UserErrors
from rwkv_train.training.instantiate import prepare

STOP = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "patience": 2}


def test_every_logger_of_conf(tmp_path: Path) -> None:
    for choice, kinds in {"none": [], "csv": [CSVLogger]}.items():
        config = launcher.load([f"logger={choice}", f"run.root={tmp_path}"])
        made = [make() for make in prepare("logger", config.logger, Logger, config.packages)]
        assert [type(logger) for logger in made] == kinds
    assert Path(made[0].root_dir) == tmp_path / config.run.name / "csv"


def test_a_callback() -> None:
    (make,) = prepare("callbacks", {"stop": STOP}, Callback)
    stop = make()
    assert isinstance(stop, EarlyStopping)
    assert (stop.monitor, stop.patience) == ("val/loss", 2)


LIGHTNING = "lightning.pytorch.callbacks"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"monitor": "x"}, "callbacks.a has no _target_"),
        (
            {"_target_": f"{LIGHTNING}.EarlyStoping"},
            "has no EarlyStoping.*nearest: lightning.pytorch.callbacks.EarlyStopping",
        ),
        ({"_target_": "lightning.pytorch.nowhere.X"}, "cannot be imported"),
        ({"_target_": "os.system", "command": "x"}, "os is no package that may be named here.*packages=\\[os\\]"),
        (
            {"_target_": "lightning.pytorch.trainer.connectors.signal_connector.subprocess.call"},
            "cannot be imported|allowed",
        ),
        ({"_target_": "lightning.pytorch.callbacks.early_stopping.torch"}, "neither a class nor a function"),
        ({"_target_": "lightning.pytorch.callbacks.early_stopping.Tensor"}, "is defined in torch"),
        ({"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "x"}, "is no Callback"),
        ({**STOP, "patince": 3}, "unexpected keyword argument 'patince'.*nearest: patience; valid: monitor, "),
        ({"_target_": STOP["_target_"]}, "missing a required argument: 'monitor'"),
        ({**STOP, "_partial_": True}, "of Hydra's own keys only _target_ is known here"),
    ],
)
def test_a_tree_that_is_wrong(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserErrors) as caught:
        prepare("callbacks", {"a": tree, "b": STOP}, Callback)
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
        "a": {"_target_": "mine.Mine", "inner": STOP},
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
    assert isinstance(callback.inner, EarlyStopping)
    with pytest.raises(UserErrors, match="mine is no package that may be named here"):
        prepare("callbacks", {"a": trees["a"]}, Callback)
