"""dry_run=true: everything up to the first step, nothing written, no process started."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_train import launcher
from rwkv_train.errors import UserError
from rwkv_train.training.run import train
from tests.runs import ROOT, words_for

FOURTEEN = ["model=14b", "trainer.devices=8", "trainer.num_nodes=8", "batch.context=4096", "batch.tokens=1048576"]
REST = ["batch.micro=2", "activation_checkpointing=true", "trainer.precision=bf16-mixed", "model.vocab_size=50277"]


def test_14b_on_64_devices(tmp_path: Path) -> None:
    """In 30 s and 3 GB, on a machine without any of them."""
    text = words_for(tmp_path, "x")
    data = ["data=text", next(word for word in text if word.startswith("data.path="))]
    words = [*FOURTEEN, *REST, *data, f"run.root={tmp_path / 'runs'}", "dry_run=true", "budget.tokens=332B"]
    before, began = sorted(tmp_path.rglob("*")), time.process_time()
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "would start at step 0 in " in done.stdout
    assert "64 processes, strategy=deepspeed_" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_maxrss * 1024 < 3e9
    assert used.ru_utime + time.process_time() - began < 30


def test_what_would_keep_it_from_starting(tmp_path: Path) -> None:
    words = [*words_for(tmp_path), "dry_run=true"]
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another process"):
            train(launcher.load(words))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: it is a file"):
        train(launcher.load([*words_for(tmp_path, "run", f"run.root={tmp_path / 'file'}"), "dry_run=true"]))
    big = [word for word in words if not word.startswith(("model.", "trainer."))]
    with pytest.raises(UserError, match="model=14b does not fit"):
        train(launcher.load([*big, "model=14b", "device=a100-40g", "trainer.devices=4", "strategy=ddp"]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="is read-only"):
        train(launcher.load([*words_for(tmp_path), "dry_run=true"]))
