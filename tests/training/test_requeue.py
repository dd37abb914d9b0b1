"""Successive attempts: no checkpoint where time is short, an end after three failures, logs of each rank."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_train.cli import launcher
from rwkv_train.cluster.rank_info import RankInfo
from rwkv_train.errors import UserError
from rwkv_train.exit_codes import ExitCode
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.training.run import train
from tests.runs import overrides_for, rows, start
from tests.training.test_signals import wait_for


def test_time_is_too_short_for_a_checkpoint(tmp_path: Path) -> None:
    """The last periodic checkpoint is kept, and a message says so."""
    run = tmp_path / "runs" / "run"
    process = start(overrides_for(tmp_path, "run", "budget.steps=100000", "cluster.grace=1e-6"))
    wait_for(run, 15)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    last = rows(run, "events.jsonl")[-1]
    saved = [row["step"] for row in rows(run, "events.jsonl") if row["event"] == "checkpoint"]
    assert (last["event"], last["signal"]) == ("preempted", "SIGTERM")
    assert last["no_checkpoint"].startswith("0 s are left and a checkpoint takes ")
    assert saved[-1] == last["step"] // 10 * 10 or last["step"] % 10 == 0
    assert f"no checkpoint of step {last['step']}: 0 s are left" in printed
    assert (
        f"SIGTERM at step {last['step']}; the same command resumes from the checkpoint of step {saved[-1]}" in printed
    )


def test_three_failures_at_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The third ends with the reason; who starts it again gets a try."""
    crash = ["+callbacks.crash._target_=tests.slurm.pace.Crash", "+callbacks.crash.step=4", "+callbacks.crash.rank=0"]
    overrides = overrides_for(tmp_path, "run", "budget.steps=9", "packages=[tests]", *crash)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a planted error"):
            train(launcher.load(overrides))
    assert train(launcher.load(overrides)) == ExitCode.GIVEN_UP
    printed = capsys.readouterr().out
    assert "has failed 3 times at step 4: rank 0 on " in printed
    assert "RuntimeError: a planted error" in printed
    run = tmp_path / "runs" / "run"
    names = [row["event"] for row in rows(run, "events.jsonl")]
    assert names == [*["started", "failed"] * 3, "given_up"]
    with pytest.raises(RuntimeError, match="a planted error"):
        train(launcher.load(overrides))


def test_each_rank_has_a_log(tmp_path: Path) -> None:
    """Rank 0 logs to its console; the log of another rank also has what C++ code writes to the file descriptors."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from rwkv_train.cluster.rank_info import RankInfo\n"
        "from rwkv_train.rundir.rank_logs import keep_log\n"
        "rank = int(sys.argv[2])\n"
        "keep_log(Path(sys.argv[1]), RankInfo(rank=rank, node=f'gpu{rank}', job='17'))\n"
        "print('\\x1b[1mbold\\x1b[0m words'); os.write(2, b'from below\\n')"
    )
    printed = []
    for rank in range(2):
        command = [sys.executable, "-c", code, str(tmp_path), str(rank)]
        printed.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    first, second = sorted(tmp_path.iterdir())
    assert (first.name, second.name) == ("rank_0000_gpu0.log", "rank_0001_gpu1.log")
    assert printed == ["\x1b[1mbold\x1b[0m words\n", ""]
    assert " on gpu1, job 17\n" in second.read_text()
    assert "from below\n" in second.read_text()
    assert "words\n" in second.read_text()


def test_an_earlier_start_of_the_same_job_is_no_hindrance(tmp_path: Path) -> None:
    """A process of a dead node may still run; what it writes does not count."""
    run = RunDirectory(str(tmp_path), "run")
    with run.claimed(True, "17"):
        with run.claimed(True, "17"):
            assert (run.path / ".lock").read_text().endswith(", job 17")
        for other in (None, "7"):
            with pytest.raises(UserError, match="in use by another process"), run.claimed(True, other):
                pass


def test_the_first_process_leaves_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a batch script: srun's own is the highest of all."""
    monkeypatch.setenv("RWKV_EXIT", str(tmp_path / "code"))
    assert launcher.main(["seed=x"]) == 2
    assert (tmp_path / "code").read_text() == "2\n"
    monkeypatch.setattr(launcher, "rank_info", lambda: RankInfo(rank=1))
    (tmp_path / "code").unlink()
    assert launcher.main(["seed=x"]) == 2
    assert not (tmp_path / "code").exists()


def test_an_exit_code_that_cannot_be_left_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that does not see the batch script's directory."""
    monkeypatch.setenv("RWKV_EXIT", str(tmp_path / "nowhere" / "code"))
    assert launcher.main(["seed=x"]) == 2
