"""Each attempt of a run writes under its own number; writes of an older one do not count and change nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rwkv_train.checkpoint.directory import list_checkpoints, newest, newest_to_resume, remove_unfinished
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.cli import launcher
from rwkv_train.errors import UserError
from rwkv_train.rundir.attempts import Attempts, Superseded
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows

NINE_STEPS = ("budget.steps=9", "checkpoint.every.steps=3", "validation.every.steps=100")


def begun(run: RunDirectory, step: int = 0, parent: int | None = None) -> int:
    number = run.attempts.claim()
    run.attempts.begin(number, step, parent)
    return number


def steps(run: RunDirectory) -> list[tuple[int, str]]:
    return [(row["step"], row["by"]) for row in rows(run.path)]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(str(tmp_path), "run")
    run.checkpoints.mkdir(parents=True)
    return run


def test_no_number_is_claimed_twice(run: RunDirectory) -> None:
    with ThreadPoolExecutor(16) as pool:
        numbers = list(pool.map(lambda _: Attempts(run.path).claim(), range(64)))
    assert sorted(numbers) == list(range(1, 65))


def test_rows_appear_in_the_merged_view_at_once_and_each_step_once(run: RunDirectory) -> None:
    with run.records(begun(run), True) as (_, lines):
        for step in (1, 2, 3, 4):
            lines.append({"step": step, "by": "first"})
            assert rows(run.path) == lines.rows()
        before = run.metrics.stat().st_ino
    assert run.metrics.stat().st_ino == before  # it was up to date: no rebuild at the end
    with run.records(begun(run, 2, 1), True) as (_, lines):
        assert steps(run) == [(1, "first"), (2, "first")]
        lines.append({"step": 3, "by": "second"})
        assert steps(run) == [(1, "first"), (2, "first"), (3, "second")]


def test_an_old_attempt_that_wakes_up_changes_nothing(run: RunDirectory) -> None:
    """It continues with everything that a run does: rows, events, its end; the newer attempt is not affected."""
    with run.records(begun(run), True) as (old_events, old_lines):
        old_events.add("started", 0)
        old_lines.append({"step": 1, "by": "old"})
        with run.records(begun(run, 1, 1), True) as (events, lines):
            events.add("resumed", 1)
            lines.append({"step": 2, "by": "new"})
            for step in (2, 3, 4):
                old_lines.append({"step": step, "by": "old"})
            old_events.add("finished", 4)
            shown = run.metrics.read_bytes(), run.events.read_bytes()
            old_lines.close()
            old_events.close()
            assert (run.metrics.read_bytes(), run.events.read_bytes()) == shown
            lines.append({"step": 3, "by": "new"})
            assert steps(run) == [(1, "old"), (2, "new"), (3, "new")]
            assert [row["event"] for row in rows(run.path, "events.jsonl")] == ["started", "resumed"]
            assert rows(run.path) == lines.rows()


def test_a_view_that_an_old_attempt_puts_in_place_late_is_replaced(run: RunDirectory) -> None:
    """It was paused between its check and the renaming."""
    with run.records(begun(run), True) as (_, old):
        old.append({"step": 1, "by": "old"})
        with run.records(begun(run), True) as (_, lines):
            lines.append({"step": 1, "by": "new"})
            run.metrics.with_name("late").write_text('{"step": 1, "by": "old"}\n')
            run.metrics.with_name("late").replace(run.metrics)
            lines.append({"step": 2, "by": "new"})
            assert steps(run) == [(1, "new"), (2, "new")]


def test_an_attempt_without_a_start_note_does_not_count(run: RunDirectory) -> None:
    first, silent = begun(run), run.attempts.claim()
    for number, step in ((first, 3), (silent, 6)):
        (run.checkpoints / f"step_{step:09d}-{number:04d}").mkdir()
    third = begun(run, 3, first)
    (run.checkpoints / f"step_{9:09d}-{third:04d}").mkdir()
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_000000003-0001", "step_000000009-0003"]


def saved(run: RunDirectory, step: int, number: int) -> Path:
    """A complete checkpoint without files."""
    path = run.checkpoints / str(CheckpointName(step, number))
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"attempt": number, "step": step, "files": {}}))
    return path


NOTE: dict[str, object] = {"attempt": 1, "step": 0, "parent": None, "seen": {}}


@pytest.mark.parametrize(
    "content",
    ["", "{", "null", "[]", "[" * 100_000, "{}", "\0" * 40]
    + [json.dumps({**NOTE, **changes}) for changes in ({"step": "0"}, {"attempt": 2}, {"seen": [1]}, {"parent": -1})],
)
def test_an_unreadable_start_note_is_not_an_absent_one(run: RunDirectory, content: str) -> None:
    """Its checkpoints would not count, and the run would begin again at step 0 beside them."""
    begun(run)
    checkpoint = saved(run, 3, 1)
    note = run.attempts.directory(1) / "start.json"
    assert newest_to_resume(run.checkpoints) == (checkpoint, [])
    note.write_text(content)
    for read in (Attempts(run.path).lineage, lambda: newest_to_resume(run.checkpoints)):
        with pytest.raises(UserError, match=rf"{note} cannot be read \(.*checkpoints of attempt 1 count\n") as caught:
            read()
        assert caught.value.remedy.endswith(f"or start a new run: run.name=NEW resume={checkpoint}")


def test_a_start_note_that_may_not_be_read_is_not_an_absent_one(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(run)

    def refused(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UserError, match=r"start\.json cannot be read \(Permission denied\)"):
        Attempts(run.path).lineage()


def test_a_note_that_was_read_is_not_needed_again(run: RunDirectory) -> None:
    """A run that is training merges its records whatever happens to the notes."""
    begun(run)
    assert run.attempts.lineage().includes(1, 5)
    (run.attempts.directory(1) / "start.json").write_text("")
    assert run.attempts.lineage().includes(1, 5)


def test_a_start_note_is_on_the_disk_before_it_has_its_name(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its directories are synced afterwards: a checkpoint must not outlive the note that makes it count."""
    order: list[tuple[str, str]] = []
    sync, replace = os.fsync, Path.replace

    def syncing(fd: int) -> None:
        order.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        sync(fd)

    def replacing(self: Path, target: Path) -> Path:
        order.append(("rename", target.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    begun(run)
    assert order == [
        ("fsync", ".start.json"),
        ("rename", "start.json"),
        *(("fsync", name) for name in ("0001", "attempts", "run")),
    ]


def test_a_disk_that_refuses_the_start_note_is_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    number = run.attempts.claim()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"0001/start\.json cannot be written: No space left on device\n  make room"):
        run.attempts.begin(number, 0, None)
    assert run.attempts.starts() == []


def test_no_start_at_step_0_beside_checkpoints_that_are_all_damaged(run: RunDirectory) -> None:
    begun(run)
    for step in (3, 6):
        (saved(run, step, 1) / "manifest.json").unlink()
    reason = r"manifest\.json cannot be read \(FileNotFoundError\)"
    what = rf"all checkpoints .* are damaged: step_000000006-0001: {reason}; step_000000003-0001: {reason}"
    with pytest.raises(UserError, match=rf"{what}\n  restore one, or run\.name=NEW starts a new run"):
        newest_to_resume(run.checkpoints)


def test_no_start_at_step_0_beside_checkpoints_that_do_not_count(run: RunDirectory) -> None:
    """The note of the attempt that wrote them is gone."""
    begun(run)
    checkpoint = saved(run, 30, 1)
    begun(run, 30, 1)
    shutil.rmtree(run.attempts.directory(1))
    with pytest.raises(UserError, match=r"step_000000030-0001, but by .*none of them belongs to the run") as caught:
        newest_to_resume(run.checkpoints)
    assert caught.value.remedy.endswith(f"resume={checkpoint} continues from that checkpoint")
    saved(run, 33, 2)
    assert newest_to_resume(run.checkpoints)[0] == run.checkpoints / "step_000000033-0002"


def test_a_run_without_checkpoints_starts_at_step_0(run: RunDirectory) -> None:
    assert newest_to_resume(run.checkpoints) == (None, [])
    begun(run)
    (run.checkpoints / ".writing-step_000000003-0001").mkdir()
    assert newest_to_resume(run.checkpoints) == (None, [])


def test_what_a_newer_one_is_writing_is_not_removed(run: RunDirectory) -> None:
    for number in (1, 2, 3):
        (run.checkpoints / f".writing-step_000000003-{number:04d}").mkdir()
    remove_unfinished(run.checkpoints, 2)
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == [
        ".writing-step_000000003-0002",
        ".writing-step_000000003-0003",
    ]


def test_a_run_without_its_attempts_is_refused(tmp_path: Path) -> None:
    """Its rows and checkpoints would not count, and the new attempt would overwrite them."""
    overrides = overrides_for(tmp_path, "run", *NINE_STEPS)
    assert train(launcher.load(overrides)) == 0
    run = tmp_path / "runs" / "run"
    before = (run / "metrics.jsonl").read_bytes()
    (run / "attempts").rename(tmp_path / "attempts")
    checkpoint = run / "checkpoints" / "step_000000009-0001"
    with pytest.raises(UserError, match=rf"attempts/ is missing.*\n.*put attempts/ back.* resume={checkpoint}"):
        train(launcher.load(overrides))
    assert (run / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="attempts/ is missing"):
        train(launcher.load(overrides))


def test_a_manifest_of_another_save_is_damage(tmp_path: Path) -> None:
    assert train(launcher.load(overrides_for(tmp_path, "run", *NINE_STEPS))) == 0
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    shutil.copy(
        checkpoints / "step_000000006-0001" / "manifest.json", checkpoints / "step_000000009-0001" / "manifest.json"
    )
    found, (damage,) = newest(checkpoints)
    assert found == checkpoints / "step_000000006-0001"
    assert damage.reason == "manifest.json belongs to step_000000006-0001"


def test_a_run_that_a_newer_start_has_taken_over_ends_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "run"
    before = RWKVModule.on_before_optimizer_step

    def and_another_starts(self: RWKVModule, optimizer: torch.optim.Optimizer) -> None:
        before(self, optimizer)
        if self.trainer.global_step == 7:
            Attempts(run).claim()

    monkeypatch.setattr(RWKVModule, "on_before_optimizer_step", and_another_starts)
    assert (
        train(
            launcher.load(
                overrides_for(tmp_path, "run", *NINE_STEPS, "checkpoint.keep=1", "checkpoint.background=false")
            )
        )
        == 4
    )
    monkeypatch.undo()
    assert f"a newer start of {run} has taken over; this one ends at step 9" in capsys.readouterr().out
    assert list_checkpoints(run / "checkpoints")[-1].name == "step_000000006-0001"
    assert not (run / "weights.pth").exists()
    assert train(launcher.load(overrides_for(tmp_path, "run", *NINE_STEPS))) == 0
    assert len(losses(run)) == 9


def test_a_rewind_of_a_superseded_attempt_claims_nothing(tmp_path: Path) -> None:
    """It was paused meanwhile, say; the newer attempt is healthy and must not lose the run to it."""
    attempts = Attempts(tmp_path / "run")
    assert [attempts.claim(), attempts.claim(after=1)] == [1, 2]
    assert attempts.claim() == 3  # another process starts the run
    with pytest.raises(Superseded):
        attempts.claim(after=2)
    assert attempts.numbers() == [1, 2, 3]
    assert attempts.claim(after=3) == 4
