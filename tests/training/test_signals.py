"""Signals end a run after a step, with a checkpoint; a rank that dies does not leave the others hanging."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from rwkv_train.checkpoint.directory import newest
from rwkv_train.cli import launcher
from rwkv_train.exit_codes import ExitCode
from rwkv_train.training.callbacks.stop import StopOnSignal
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows, same_weights, start, start_ranks

LONG_RUN = (
    "budget.steps=400",
    "checkpoint.every.steps=20",
    "validation.every.steps=1000",
    "optim.schedule.shape=constant",
)


def number_of(process: ForkServerProcess) -> int:
    assert process.pid is not None
    return process.pid


def wait_for(run: Path, lines: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) >= lines:
            return
        time.sleep(0.02)
    raise AssertionError("the run does not get on")


@pytest.mark.parametrize(
    ("name", "strategy"), [("SIGTERM", "ddp"), ("SIGTERM", "deepspeed_2"), ("SIGUSR1", "ddp"), ("SIGHUP", "ddp")]
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(tmp_path: Path, name: str, strategy: str) -> None:
    overrides, run = overrides_for(tmp_path, "run", *LONG_RUN, f"strategy={strategy}"), tmp_path / "runs" / "run"
    processes = start_ranks(overrides, 2)
    wait_for(run, 5)
    os.kill(number_of(processes[1]), signal.Signals[name])
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [75, 0]
    step = len(losses(run))
    assert 5 <= step < 400
    found, damaged = newest(run / "checkpoints")
    assert found is not None
    assert not damaged
    assert found.name == f"step_{step:09d}-0001"
    assert rows(run, "events.jsonl")[-1]["event"] == "preempted"


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_under_nohup(ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        signals = StopOnSignal()
        with signals.heard():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == (None if ignored else signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    overrides, run = overrides_for(tmp_path, "run", *LONG_RUN, "checkpoint.every.steps=500"), tmp_path / "runs" / "run"
    (process,) = start_ranks(overrides, 1)
    wait_for(run, 3)
    for _ in range(200):  # in a row, so that a step cannot end in between
        if process.exitcode is None:
            with suppress(ProcessLookupError):  # it has left between the question and the signal
                os.kill(number_of(process), signal.SIGINT)
            time.sleep(0.0005)
    process.join(60)
    assert process.exitcode == 130
    assert not list((run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_rank_dies_the_other_ends(tmp_path: Path, lost: int) -> None:
    overrides, run = overrides_for(tmp_path, "run", *LONG_RUN), tmp_path / "runs" / "run"
    processes = start_ranks(overrides, 2)
    wait_for(run, 5)
    processes[lost].kill()
    other = processes[1 - lost]
    other.join(30)
    assert other.exitcode == 1


def test_stopped_and_gone_on_with_is_the_run_without_a_stop(tmp_path: Path) -> None:
    steps = ("budget.steps=150", "checkpoint.every.steps=500", "validation.every.steps=60")
    assert train(launcher.load(overrides_for(tmp_path, "whole", *steps))) == 0
    stopped = tmp_path / "runs" / "stopped"
    (process,) = start_ranks(overrides_for(tmp_path, "stopped", *steps), 1)
    wait_for(stopped, 6)
    process.terminate()
    process.join(60)
    assert process.exitcode == ExitCode.STOPPED
    assert 6 <= len(losses(stopped)) < 150
    assert train(launcher.load(overrides_for(tmp_path, "stopped", *steps))) == 0
    whole = tmp_path / "runs" / "whole"
    assert losses(stopped) == losses(whole)
    assert [row.get("val/loss") for row in rows(stopped)] == [row.get("val/loss") for row in rows(whole)]
    assert same_weights(stopped, whole)


def test_a_port_in_use(tmp_path: Path) -> None:
    """One message, no process left: the first rank ends those that it has started."""
    overrides = [*overrides_for(tmp_path, "run", "budget.steps=5", "strategy=ddp"), "trainer.devices=2"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        overrides.remove("trainer.devices=1")
        with start(overrides, MASTER_PORT=port) as process:
            try:
                printed = process.communicate(timeout=170)[0]  # its end is the end of all that hold the pipe
            finally:
                process.kill()
    assert process.returncode == 1  # not a mistake in the settings: whatever starts the run starts it again
    assert "error: the port over which the ranks find each other is in use: " in printed
    assert "\n  the same command again, or MASTER_PORT=NUMBER before it for another port\n" in printed
    assert "Traceback" not in printed
