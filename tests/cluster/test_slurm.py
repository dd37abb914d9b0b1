"""What a job asks of SLURM, with a scontrol of given answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_train.cluster.slurm import Job

Scontrol = Callable[[str], Path]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scontrol:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def answers(script: str) -> Path:
        (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/asked"\n{script}\n')
        (tmp_path / "scontrol").chmod(0o755)
        return tmp_path / "asked"

    return answers


def test_time_left(scontrol: Scontrol) -> None:
    scontrol("echo JobId=7 JobState=RUNNING EndTime=$(date -d '+100 seconds' +%FT%T)")
    left = Job("7").seconds_left()
    assert left is not None
    assert 90 < left <= 100
    scontrol("echo JobId=7 EndTime=Unknown")
    assert Job("7").seconds_left() is None
    scontrol("exit 1")
    assert Job("7").seconds_left() is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("JobState=RUNNING BatchFlag=1", None),
        ("JobState=SIGNALING BatchFlag=1", None),  # while SLURM sends the signal
        ("", None),  # a controller that does not answer now will be asked later
        ("JobState=CANCELLED BatchFlag=1", "job 7 is CANCELLED"),
        ("JobState=PENDING BatchFlag=1", "job 7 is PENDING"),
        ("JobState=RUNNING BatchFlag=0", "job 7 has no batch script: sbatch starts jobs that can come back"),
    ],
)
def test_a_job_that_is_not_to_come_back(scontrol: Scontrol, answer: str, reason: str | None) -> None:
    scontrol(f"echo JobId=7 {answer}")
    assert Job("7").why_not() == reason
    assert Job("7", None).why_not() == "cluster.requeue=null"


def test_requeue(scontrol: Scontrol) -> None:
    asked = scontrol("")
    assert Job("7_3").requeue() is None
    assert asked.read_text() == "requeue 7_3\n"
    scontrol("echo 'Job has already finished' >&2; exit 1")
    assert Job("7").requeue() == "scontrol requeue 7: Job has already finished"
    scontrol("exit 3")
    assert Job("7").requeue() == "scontrol requeue 7: exit code 3"


def test_the_site_has_a_command_of_its_own(scontrol: Scontrol, tmp_path: Path) -> None:
    own = tmp_path / "again"
    own.write_text(f'#!/bin/sh\necho "$@" >"{tmp_path}/own"\n')
    own.chmod(0o755)
    assert Job("7", "again --now 'a b'").requeue() is None
    assert (tmp_path / "own").read_text() == "--now a b 7\n"
    missing = Job("7", "no-such-command").requeue()
    assert missing is not None
    assert missing.startswith("no-such-command 7: ")
