"""Concurrent attempts, paused or killed anywhere: no partial checkpoint, no file with two writers, nothing lost."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rwkv_train.checkpoint import commit, directory, writer
from rwkv_train.checkpoint.retention import Retention
from rwkv_train.checkpoint.storage import MANIFEST, LocalStorage
from rwkv_train.rundir.attempts import Attempts, Lineage
from rwkv_train.rundir.jsonl import MergedView
from tests.checkpoint.writing import play


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory if there is such a file system: thousands of directories are created and removed."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path) / "world"
    gc.collect()  # a file that a killed process has left open fails the test that ran it, and no later one


def failures(folder: Path, seeds: range) -> list[str]:
    return [f"seed {seed}: {wrong}" for seed in seeds if (wrong := play(folder, seed)) is not None]


def test_every_schedule_leaves_a_complete_run(folder: Path) -> None:
    assert failures(folder, range(150)) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_schedules(folder: Path) -> None:
    assert failures(folder, range(1000, 2000)) == []


CLAIM = Attempts.claim


def everything_counts(self: Lineage, number: int, step: int) -> bool:
    return True


def the_manifest_is_not_waited_for(self: commit.Commit, more: Any) -> dict[str, Any]:
    """Written with the acks that have come so far."""
    files = {name: entry for ack in self._acks.values() for name, entry in ack.files.items()}
    return {"attempt": self.attempt, "step": self.step, "files": {**files, **more}}


def a_number_is_looked_up(self: Attempts, after: int | None = None) -> int:
    """A check, then a write: two processes may have checked at the same time."""
    number = max(self.numbers(), default=0) + 1
    self.directory(number).mkdir(parents=True, exist_ok=True)
    return number


def a_rewind_asks_nobody(self: Attempts, after: int | None = None) -> int:
    return CLAIM(self)


def the_merge_is_followed_by_its_name(self: MergedView, lines: bytes) -> None:
    with open(self.path, "ab") as file:
        file.write(lines)


def without_a_number(path: Path) -> Path:
    return path.with_name(".writing-" + path.name.partition("-")[0])


def deleted_under_its_name(self: LocalStorage, path: Path) -> None:
    """First the manifest, then the rest: a kill in between leaves a damaged checkpoint that counts."""
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


BROKEN_RULES: list[tuple[Any, str, Callable[..., Any]]] = [
    (Lineage, "includes", everything_counts),
    (commit.Commit, "manifest", the_manifest_is_not_waited_for),
    (Attempts, "claim", a_number_is_looked_up),
    (Attempts, "claim", a_rewind_asks_nobody),
    (Attempts, "superseded", lambda self, number: False),
    (Attempts, "lineage", lambda self, head=None: Lineage([])),
    (MergedView, "append", the_merge_is_followed_by_its_name),
    (writer, "temporary_path", without_a_number),
    (LocalStorage, "delete", deleted_under_its_name),
    (Retention, "_outdated", lambda self, attempt, lineage: []),
    (directory, "is_doomed", lambda name: False),
    (directory, "attempt_of_temporary", lambda name: None),
]


@pytest.mark.parametrize("number", range(len(BROKEN_RULES)))
def test_a_broken_rule_is_seen(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, instead = BROKEN_RULES[number]
    monkeypatch.setattr(where, name, instead)
    if instead is the_manifest_is_not_waited_for:
        monkeypatch.setattr(commit.Commit, "missing", property(lambda self: []))
    assert any(play(folder, seed) is not None for seed in range(400))
