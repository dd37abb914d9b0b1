"""dry_run=true: everything up to the first step, nothing written, no process started."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_train.cli import launcher
from rwkv_train.errors import UserError
from rwkv_train.training.run import train
from tests.runs import ROOT, overrides_for

PLAN_14B = ["model=14b", "trainer.devices=8", "trainer.num_nodes=8", "batch.context=4096", "batch.tokens=1048576"]
OTHERS = [
    "batch.micro=2",
    "activation_checkpointing=true",
    "trainer.precision=bf16-mixed",
    "model.vocab_size=50277",
]

MEASURED_RUN = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "train.py", *sys.argv[1:]]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of this child alone
print(used.ru_maxrss * 1024, used.ru_utime + used.ru_stime)
sys.exit(code)
"""


def test_14b_on_64_devices(tmp_path: Path) -> None:
    """In 30 s and 3 GB, on a machine without any of them."""
    text = overrides_for(tmp_path, "x")
    data = ["data=text", next(override for override in text if override.startswith("data.path="))]
    overrides = [
        *PLAN_14B,
        *OTHERS,
        *data,
        f"run.root={tmp_path / 'runs'}",
        "dry_run=true",
        "budget.tokens=332B",
    ]
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run([sys.executable, "-c", MEASURED_RUN, *overrides], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "would start at step 0 in " in done.stdout
    assert "64 processes, strategy=deepspeed_" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    bytes_used, seconds_used = map(float, done.stdout.splitlines()[-1].split())
    assert bytes_used < 3e9
    assert seconds_used < 30


def test_what_would_keep_it_from_starting(tmp_path: Path) -> None:
    overrides = [*overrides_for(tmp_path), "dry_run=true"]
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another process"):
            train(launcher.load(overrides))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: it is a file"):
        train(launcher.load([*overrides_for(tmp_path, "run", f"run.root={tmp_path / 'file'}"), "dry_run=true"]))
    big = [override for override in overrides if not override.startswith(("model.", "trainer."))]
    with pytest.raises(UserError, match="model=14b does not fit"):
        train(launcher.load([*big, "model=14b", "device=a100-40g", "trainer.devices=4", "strategy=ddp"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+logger.a._target_=os.system", "the package os is not allowed"),
        ("+logger.a._target_=lightning.pytorch.callbacks.Callback", "is not a Logger"),
        ("+callbacks.a._target_=lightning.fabric.utilities.cloud_io._load", "_load is not a class"),
        ("+callbacks.a._target_=lightning.pytorch.callbacks.EarlyStopping", "missing a required argument: 'monitor'"),
    ],
)
@pytest.mark.parametrize("dry", ["dry_run=true", "dry_run=false"])
def test_loggers_and_callbacks_that_a_run_would_refuse(tmp_path: Path, override: str, message: str, dry: str) -> None:
    with pytest.raises(UserError, match=message):
        train(launcher.load([*overrides_for(tmp_path), override, dry]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="is read-only"):
        train(launcher.load([*overrides_for(tmp_path), "dry_run=true"]))
