"""What is deleted after a save, how, and that nothing which follows a commit makes the save fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from rwkv_train.checkpoint.directory import list_checkpoints, newest, remove_unfinished, verify
from rwkv_train.checkpoint.meta import META
from rwkv_train.checkpoint.name import CheckpointName, complete_inside
from rwkv_train.checkpoint.retention import Retention
from rwkv_train.checkpoint.storage import LocalStorage
from rwkv_train.checkpoint.writer import InProcessStore, SaveOutcome, Writer
from rwkv_train.config import Duration
from rwkv_train.rundir.attempts import Attempts
from tests.checkpoint.metas import meta_of


class Run:
    """Attempts and checkpoints of a run, written by the real writer."""

    def __init__(self, folder: Path) -> None:
        self.attempts, self.checkpoints = Attempts(folder), folder / "checkpoints"
        self.checkpoints.mkdir()

    def begin(self, step: int = 0, parent: int | None = None) -> int:
        number = self.attempts.claim()
        self.attempts.begin(number, step, parent)
        return number

    def save(self, step: int, number: int, loss: float | None = None, **more: Any) -> SaveOutcome:
        tokens = {"tokens": more.pop("tokens")} if "tokens" in more else {}
        path = self.checkpoints / str(CheckpointName(step, number))
        saving = Writer(more.pop("storage", LocalStorage()), 0, 1, InProcessStore(), **more)
        saving.begin(path, {"part.json": [step]}, meta_of(step=step, val_loss=loss, **tokens))
        saving.wait()
        (outcome,) = saving.finished()
        return outcome

    def retention(self, keep: int = 2, permanent: int | Duration | None = None, best: bool = False) -> Retention:
        span = Duration(steps=permanent) if isinstance(permanent, int) else permanent
        return Retention(self.checkpoints, self.attempts, keep, span, best, LocalStorage())

    def names(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.iterdir() if path.name != "latest")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def steps(paths: list[Path]) -> list[int]:
    return [CheckpointName.of(path).step for path in paths]


def test_the_newest_complete_ones_stay_and_a_damaged_one_is_none_of_them(run: Run) -> None:
    run.begin()
    for step in range(1, 8):
        run.save(step, 1)
    for step in (2, 6):
        (run.checkpoints / str(CheckpointName(step, 1)) / "part.json").unlink()
    (run.checkpoints / str(CheckpointName(3, 1)) / "manifest.json").unlink()
    assert steps(run.retention(keep=2).superfluous(1)) == [1, 2, 3, 4]  # 7 and 5 stay, 6 is not older than both
    assert steps(run.retention(keep=2, permanent=2).superfluous(1)) == [1, 3]
    assert steps(run.retention(keep=6).superfluous(1)) == []  # there are four


def test_permanent_tokens_are_those_recorded_also_after_the_batch_was_changed(run: Run) -> None:
    """300 tokens a step until step 6, then 600: a rule of steps would move what is permanent."""
    run.begin()
    tokens = {step: 300 * min(step, 6) + 600 * max(0, step - 6) for step in range(1, 13)}
    for step in range(1, 7):
        run.save(step, 1, tokens=tokens[step])
    run.begin(6, 1)
    for step in range(7, 13):
        run.save(step, 2, tokens=tokens[step])
    rule = run.retention(keep=1, permanent=Duration(tokens=1000))
    kept = {4: 1200, 7: 2400, 8: 3000, 10: 4200, 12: 5400}
    assert {step: tokens[step] for step in kept} == kept
    for path in rule.superfluous(2):
        shutil.rmtree(path)
    assert [CheckpointName.of(run.checkpoints / name).step for name in run.names()] == list(kept)
    assert rule.superfluous(2) == []  # the same ones stay when their neighbours are gone
    third = run.begin(4, 1)
    assert steps(rule.outdated(third)) == []
    assert steps(run.retention(permanent=Duration(tokens=10**9)).outdated(third)) == [7, 8, 10, 12]


def test_the_best_one_stays_and_a_damaged_one_has_no_loss(run: Run) -> None:
    run.begin()
    for step, loss in enumerate((1.0, 2.0, 3.0, 1.5, 4.0, 4.0), 1):
        run.save(step, 1, loss)
    assert steps(run.retention(best=True).superfluous(1)) == [2, 3, 4]
    (run.checkpoints / str(CheckpointName(1, 1)) / META).unlink()
    assert steps(run.retention(best=True).superfluous(1)) == [1, 2, 3]


def test_what_no_longer_counts_is_deleted_but_nothing_of_a_newer_attempt(run: Run) -> None:
    """Attempt 2 has continued from step 3 of the first one, attempt 3 from step 6 of the second one."""
    first, second, third, fourth = run.begin(), run.begin(3, 1), run.begin(6, 2), run.begin(6, 2)
    for step, number in ((3, first), (6, first), (9, first), (6, second), (9, second), (9, third), (12, third)):
        run.save(step, number)
    run.save(9, fourth)
    shown = [
        (name.step, name.attempt) for path in run.retention().outdated(third) for name in [CheckpointName.of(path)]
    ]
    assert shown == [(6, first), (9, first), (9, second)]
    assert steps(run.retention(permanent=9).outdated(third)) == [6]  # those are never deleted
    deleted = [path.name for path in run.retention().superfluous(third)]
    assert deleted == [
        "step_000000006-0001",
        "step_000000009-0001",
        "step_000000009-0002",
        "step_000000003-0001",
        "step_000000006-0002",
    ]


@pytest.mark.parametrize("counts", [True, False])
def test_a_checkpoint_that_was_moved_and_linked_back_is_left_alone(run: Run, tmp_path: Path, counts: bool) -> None:
    run.begin()
    for step in (1, 2, 3, 4):
        run.save(step, 1)
    number = 1 if counts else run.begin(1, 1)
    link, archive = run.checkpoints / str(CheckpointName(2, 1)), tmp_path / "archive"
    link.rename(archive)
    link.symlink_to(archive)
    assert steps(run.retention(keep=1).superfluous(number)) == ([1, 3] if counts else [3, 4])
    assert verify(link) is None  # and one may resume from it
    LocalStorage().delete(link)
    assert not link.is_symlink()
    assert sorted(path.name for path in archive.iterdir()) == ["manifest.json", "meta.json", "part.json"]


def test_a_deletion_that_is_killed_leaves_no_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.begin()
    for step in (1, 2):
        run.save(step, 1)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            LocalStorage().delete(run.checkpoints / str(CheckpointName(2, 1)))
    assert run.names() == [".deleting-step_000000002-0001", "step_000000001-0001"]
    kept = run.checkpoints / str(CheckpointName(1, 1))
    assert list_checkpoints(run.checkpoints) == complete_inside(run.checkpoints) == [kept]
    assert newest(run.checkpoints) == (kept, [])
    run.save(2, 1)
    LocalStorage().delete(run.checkpoints / str(CheckpointName(2, 1)))  # the same name again
    assert run.names() == ["step_000000001-0001"]
    (run.checkpoints / ".deleting-step_000000002-0001" / "rest").mkdir(parents=True)
    remove_unfinished(run.checkpoints, 1)
    assert run.names() == ["step_000000001-0001"]


def test_two_may_delete_the_same_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, remove = tmp_path / "step_000000001-0001", shutil.rmtree
    path.mkdir()

    def after_another(path: Path) -> None:
        remove(path)
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", after_another)
    LocalStorage().delete(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("no such thing"), OSError(errno.EIO, "Input/output error")])
def test_what_follows_a_commit_does_not_make_the_save_fail(run: Run, error: Exception) -> None:
    def retain() -> None:
        raise error

    run.begin()
    outcome = run.save(1, 1, on_commit=retain)
    assert outcome.error is None
    assert outcome.trouble == ("ValueError('no such thing')" if isinstance(error, ValueError) else "Input/output error")
    assert newest(run.checkpoints) == (outcome.path, [])


def test_a_disk_that_refuses_to_name_the_newest_does_not_make_the_save_fail(run: Run) -> None:
    """Nor to remove what it has written for it, and old checkpoints are deleted all the same."""

    class Stubborn(LocalStorage):
        def rename(self, source: Path, target: Path) -> None:
            if target.name == "latest":
                raise OSError(errno.EROFS, "Read-only file system")
            super().rename(source, target)

        def delete(self, path: Path) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

    run.begin()
    called: list[bool] = []
    outcome = run.save(1, 1, on_commit=lambda: called.append(True), storage=Stubborn())
    assert (outcome.error, outcome.trouble, called) == (None, "Read-only file system", [True])


def test_rank_0_removes_a_save_that_failed_once_no_rank_writes(tmp_path: Path) -> None:
    class Board(InProcessStore):
        """Rank 1 writes its part while rank 0 waits for it."""

        def wait(self, keys: list[str], timeout: Any) -> None:
            saving[1].begin(path, {"part_1.json": 1}, meta_of())
            saving[1].wait()
            super().wait(keys, timeout)

    class Full(LocalStorage):
        def write(self, path: Path) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

    store, path = Board(), tmp_path / "step_000000001-0001"
    saving = [Writer(Full(), 0, 2, store), Writer(LocalStorage(), 1, 2, store)]
    saving[0].begin(path, {"part_0.json": 0}, meta_of())
    saving[0].wait()
    (outcome,) = saving[0].finished()
    assert outcome.error == "No space left on device"
    assert json.loads(store.get(f"1/{path.name}/1"))["error"] is None
    assert list(tmp_path.iterdir()) == []


def test_the_names_in_a_new_checkpoint_are_on_the_disk_before_it_counts(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POSIX: the sync of a file need not put its name on the disk."""
    order: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def syncing(fd: int) -> None:
        order.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        sync(fd)

    def renaming(source: Path, target: Path) -> None:
        order.append(("rename", target.name))
        rename(source, target)

    run.begin()
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    name = run.save(5, 1).path.name
    before = order[: order.index(("rename", name))]
    temporary = f".writing-{name}"
    assert before == [("fsync", file) for file in ("part.json", "meta.json", "manifest.json", temporary)]
    assert order[len(before) + 1] == ("fsync", "checkpoints")


def test_an_outcome_that_comes_while_others_are_taken_is_not_lost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.begin()
    saving = Writer(LocalStorage(), 0, 1, InProcessStore())
    taken: list[SaveOutcome] = []
    clock = time.perf_counter

    def training_asks_now() -> float:
        taken.extend(saving.finished())
        return clock()

    monkeypatch.setattr(time, "perf_counter", training_asks_now)
    saving._save(run.checkpoints / str(CheckpointName(1, 1)), {}, meta_of(step=1), "1")
    taken += saving.finished()
    assert [outcome.error for outcome in taken] == [None]


def test_the_store_holds_the_messages_of_one_save(run: Run) -> None:
    class Counting(InProcessStore):
        @property
        def keys(self) -> list[str]:
            return sorted(self._values)

    run.begin()
    store = Counting()
    ranks = [Writer(LocalStorage(), rank, 3, store) for rank in (2, 1, 0)]
    for step in (1, 2, 3):
        for each in ranks:  # rank 0 comes last: it reads the others' messages
            each.begin(run.checkpoints / str(CheckpointName(step, 1)), {f"{each.rank}.json": step}, meta_of(step=step))
            each.wait()
        assert store.keys == [f"{step}/{CheckpointName(step, 1)}/{rank}" for rank in range(3)]
    assert [len(each.finished()) for each in ranks] == [3, 3, 3]
