"""Faults during a run that are no user errors, and runs at the limits of settings."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rwkv_train.checkpoint.directory import newest
from rwkv_train.cli import launcher
from rwkv_train.rundir.jsonl import JsonLines
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows, start_ranks, train_ranks, write_text
from tests.training.faults import SmallFiles


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: more is refused, as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def validated(run: Path) -> list[int]:
    return [row["step"] for row in rows(run) if "val/loss" in row]


def test_a_full_disk_refuses_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints, rows, samples, weights, curve: each is reported, the run continues to its end, with exit code 3."""
    overrides = overrides_for(tmp_path, "run", "budget.steps=60", "samples.tokens=20")
    assert train(launcher.load([*overrides, "budget.steps=20"])) == 0
    run = tmp_path / "runs" / "run"
    before = {name: (run / name).read_bytes() for name in ("loss.png", "weights.pth", "metrics.jsonl")}
    capsys.readouterr()
    with disk_with_room_for(len(before["metrics.jsonl"]) + 600):
        assert train(launcher.load([*overrides, "run.allow_changes=true"])) == 3
    printed = capsys.readouterr()
    for name in ("metrics.jsonl", "weights.pth", "loss.png"):
        assert printed.err.count(f"{run / name} could not be written: ") == 1
    assert (
        printed.err.count("could not be written: File too large\n  training continues") == 4
    )  # checkpoints 30, 40, 50, 60
    kept = newest(run / "checkpoints")[0]
    assert kept is not None
    assert kept.name == "step_000000020-0001"
    assert f"the last complete checkpoint is {kept}" in printed.out
    assert "60 steps, 7,680 tokens" in printed.out  # the summary includes the unwritten rows
    assert (run / "loss.png").read_bytes() == before["loss.png"]
    assert (run / "weights.pth").read_bytes() == before["weights.pth"]
    assert (run / "metrics.jsonl").read_bytes().startswith(before["metrics.jsonl"])
    assert len(losses(run)) < 60  # complete rows only

    assert train(launcher.load([*overrides, "run.allow_changes=true"])) == 0  # there is room again
    assert len(losses(run)) == 60


def test_a_disk_that_fills_up_under_two_ranks(tmp_path: Path) -> None:
    """Both write; rank 0 ends with 3 when all steps are done, and the earlier checkpoint is kept."""
    overrides = overrides_for(tmp_path, "run", "strategy=fsdp", "checkpoint.every.steps=5", "run.allow_changes=true")
    train_ranks([*overrides, "budget.steps=10"], 2)
    run = tmp_path / "runs" / "run"
    processes = start_ranks(
        [*overrides, "budget.steps=30"], 2, SmallFiles(40_000)
    )  # a file of weights has 90,000 bytes
    for process in processes:
        process.join(170)
        process.kill()
    printed = next((run / "logs").glob("rank_0000_*.log")).read_text()
    assert [process.exitcode for process in processes] == [3, 0], printed
    assert printed.count("could not be written: File too large\n  training continues") == 4  # 15, 20, 25, 30
    kept, damaged = newest(run / "checkpoints")
    assert kept == run / "checkpoints" / "step_000000010-0001"
    assert not damaged
    assert printed.count(f"the last complete checkpoint is {kept}") == 5
    assert len(losses(run)) == 30
    assert "Traceback" not in printed


def test_rows_are_written_once_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.append({"step": 1})
    with disk_with_room_for(20):
        for step in (2, 3, 4):
            lines.append({"step": step})
        assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1}\n'
        assert lines.lost == 3
    assert capsys.readouterr().err.count("could not be written") == 1
    assert [row["step"] for row in lines.rows()] == [1, 2, 3, 4]
    lines.append({"step": 5})
    assert lines.lost == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    draw = random.Random(1)
    (tmp_path / "text.txt").write_bytes(bytes(draw.randrange(128, 256) for _ in range(3000)))
    assert train(launcher.load(overrides_for(tmp_path, "run", "budget.steps=3", "samples.tokens=30"))) == 0
    run = tmp_path / "runs" / "run"
    assert len(losses(run)) == 3
    assert "after 3 steps" in (run / "samples.txt").read_text(encoding="utf-8")


def test_eighteen_short_samples(tmp_path: Path) -> None:
    """Each is a document of one line; every step reads more samples than there are."""
    folder = tmp_path / "lines"
    folder.mkdir()
    for number in range(18):
        (folder / f"{number:02}.txt").write_text(f"sample number {number} of eighteen\n")
    overrides = overrides_for(tmp_path, "run", f"data.path={folder}", "budget.steps=30", "batch.tokens=1024")
    assert train(launcher.load(overrides)) == 0
    found = losses(tmp_path / "runs" / "run")
    assert found[-1] < 0.6 * found[0]


def test_nothing_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(launcher.load(overrides_for(tmp_path, "run", "budget.steps=3", "data.hold_out=0"))) == 0
    run = tmp_path / "runs" / "run"
    assert validated(run) == []
    printed = capsys.readouterr().out
    assert "held out: nothing" in printed
    assert "3 steps, 384 tokens" in printed
    assert (run / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize(("every", "steps"), [(3, [3, 6]), (2, [2, 4, 6]), (4, [4, 6]), (100, [6])])
def test_validation_comes_when_due_and_once_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, steps: list[int]
) -> None:
    """With two passes a step: the interval counts steps."""
    seen: list[int] = []
    log = RWKVModule.on_validation_epoch_end

    def note(self: RWKVModule) -> None:
        seen.append(self.trainer.global_step)
        log(self)

    monkeypatch.setattr(RWKVModule, "on_validation_epoch_end", note)
    overrides = overrides_for(tmp_path, "run", "budget.steps=6", f"validation.every.steps={every}", "batch.micro=2")
    assert train(launcher.load(overrides)) == 0
    assert seen == steps
    assert validated(tmp_path / "runs" / "run") == steps


def test_out_of_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each start has the full time, however long the run has taken before."""
    overrides = overrides_for(tmp_path, "run", "budget.hours=1e-9", "batch.micro=2")
    run = tmp_path / "runs" / "run"
    for step in (1, 2, 3):
        assert train(launcher.load(overrides)) == 0
        printed = capsys.readouterr().out
        ending = f"budget.hours=1e-09 is over: step {step} of 50; the same command resumes from the checkpoint of step"
        assert f"{ending} {step}\n" in printed
        assert len(losses(run)) == step
        assert validated(run) == list(range(1, step + 1))  # where it stopped
    events = [row["event"] for row in rows(run, "events.jsonl") if row["event"] != "checkpoint"]
    assert events == ["started", "stopped", "resumed", "stopped", "resumed", "stopped"]


def test_a_run_stopped_by_the_clock_again_and_again_equals_an_undisturbed_run(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt")
    assert train(launcher.load(overrides_for(tmp_path, "whole", "budget.steps=3"))) == 0
    for _ in range(3):
        assert train(launcher.load(overrides_for(tmp_path, "pieces", "budget.steps=3", "budget.hours=1e-9"))) == 0
    whole, pieces = (losses(tmp_path / "runs" / name) for name in ("whole", "pieces"))
    assert pieces == whole


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(launcher.load(overrides_for(tmp_path, "run", "budget.steps=1", "resume=auto"))) == 0
    assert "resume=auto: nothing to resume in" in capsys.readouterr().out
    assert len(losses(tmp_path / "runs" / "run")) == 1


def test_interrupted_before_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*overrides: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "_build_configs", interrupt)
    assert launcher.main([]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
