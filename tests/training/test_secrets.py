"""What a logger or a callback gets from the environment stands in no file, and in nothing that trackers get or send."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rwkv_train.cli import launcher
from rwkv_train.cluster.sweep import _parameters
from rwkv_train.errors import UserErrors
from rwkv_train.training.run import train
from tests.runs import overrides_for
from tests.trackers.spies import Keyed
from tests.training.spies import KeyedCallback

SECRET = "s3cret-of-the-environment"
KEYED = [
    "packages=[tests]",
    "+logger.a._target_=tests.trackers.spies.Keyed",
    "+logger.a.key=${oc.env:MY_API_KEY}",
    "+logger.b._target_=tests.trackers.spies.Keyed",
    "+logger.b.key=${run.name}/${logger.a.key}",
    "+callbacks.c._target_=tests.training.spies.KeyedCallback",
    "+callbacks.c.key=${oc.env:MY_API_KEY}",
]


def test_a_key_of_the_environment_is_recorded_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    run = tmp_path / "runs" / "run"
    bad_step = ["+callbacks.fault._target_=tests.training.faults.Fault", "+callbacks.fault.steps=[2]", *KEYED]
    overrides = overrides_for(tmp_path, "run", "budget.steps=3", "checkpoint.every.steps=1", *bad_step)
    assert launcher.main(["--cfg", *overrides]) == 0
    assert train(launcher.load(overrides)) == 0
    assert [key for key, _ in Keyed.made] == [SECRET, f"run/{SECRET}"]
    assert KeyedCallback.keys == [SECRET]
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "meta.json", "step_000000002.json"} <= {path.name for path in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in json.dumps(dict(Keyed.made[0][1].info))
    assert SECRET not in "".join(capfd.readouterr())
    logger = yaml.safe_load((run / "config.yaml").read_text())["logger"]
    assert (logger["a"]["key"], logger["b"]["key"]) == ("${oc.env:MY_API_KEY}", "${run.name}/${logger.a.key}")


def test_what_cannot_be_resolved_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_API_KEY", raising=False)
    with pytest.raises(UserErrors, match="MY_API_KEY"):
        launcher.load(overrides_for(tmp_path, "run", *KEYED))


def test_a_job_gets_the_resolved_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("MY_ACCOUNT", "mine")
    config = launcher.load(overrides_for(tmp_path, "run", "launcher=slurm", "launcher.account=${oc.env:MY_ACCOUNT}"))
    assert config.launcher["account"] == "${oc.env:MY_ACCOUNT}"
    assert _parameters(config)["slurm_account"] == "mine"
