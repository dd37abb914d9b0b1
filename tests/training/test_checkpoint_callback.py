"""The callback of checkpoints: in the training thread nothing long happens outside a phase that the watchdog knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rwkv_train.checkpoint import directory
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.storage import LocalStorage
from rwkv_train.checkpoint.writer import InProcessStore, SaveOutcome, Writer
from rwkv_train.config import CheckpointSettings, Duration
from rwkv_train.rundir.attempts import Attempts
from rwkv_train.rundir.jsonl import Events
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback
from tests.checkpoint.metas import meta_of

TRAINING = Path(__file__).parents[2] / "rwkv_train" / "training"
READERS = ("newest", "newest_to_resume", "verify", "refuse_damage", "sha256")  # hash unless content=False


@pytest.fixture
def callback(tmp_path: Path) -> CheckpointCallback:
    """Of a run with a complete checkpoint of step 4."""
    attempts = Attempts(tmp_path)
    attempts.begin(attempts.claim(), 0, None)
    writer = Writer(LocalStorage(), 0, 1, InProcessStore())
    writer.begin(tmp_path / "checkpoints" / str(CheckpointName(4, 1)), {"part.json": 1}, meta_of(step=4))
    writer.wait()
    settings = CheckpointSettings(Duration(steps=4), 2, None, False, True)
    events = Events(tmp_path / "events.jsonl")
    return CheckpointCallback(tmp_path / "checkpoints", settings, 1, cast(Any, None), {}, events)


def test_no_branch_of_the_report_of_a_save_hashes(
    callback: CheckpointCallback, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other ranks wait in the next collective: hashing 100 GB looked to the watchdog as if this rank hung."""

    def slow(path: Path) -> str:
        raise AssertionError(f"{path} is hashed")

    monkeypatch.setattr(directory, "sha256", slow)
    path = callback.directory / str(CheckpointName(8, 1))
    outcomes = [
        SaveOutcome(path, 1.0, error="No space left on device"),
        SaveOutcome(path, 1.0, trouble="Input/output error"),
        SaveOutcome(path, 1.0),
    ]
    strategy = SimpleNamespace(writer=SimpleNamespace(finished=lambda: outcomes))
    callback._report(cast(Any, strategy))
    printed = capsys.readouterr().err
    kept = callback.directory / str(CheckpointName(4, 1))
    assert (
        f"could not be written: No space left on device\n  training continues; the last complete checkpoint is {kept}\n"
        in printed
    )
    assert f"WARNING: {path} is complete, but then: Input/output error\n" in printed
    assert callback.failures == 1
    assert callback.last == 8
    events = [row["event"] for row in callback.events.rows()]
    assert events == ["checkpoint_failed", "checkpoint", "checkpoint"]


def test_the_watchdog_knows_that_the_end_waits_for_a_save(callback: CheckpointCallback) -> None:
    """Also where the last step is not saved, and the save before it is still under way."""
    order: list[str] = []
    callback.waiting = lambda step: order.append(f"waiting at step {step}")
    callback.skip_last_save()
    writer = SimpleNamespace(finished=lambda: [])
    strategy = SimpleNamespace(settle=lambda: order.append("settle"), writer=writer)
    callback.on_train_end(cast(Any, SimpleNamespace(global_step=5, strategy=strategy)), cast(Any, None))
    assert order == ["waiting at step 5", "settle"]


def hashing_calls(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(function, line) of each call that reads the content of a checkpoint."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS):
                continue
            content = [word.value for word in node.keywords if word.arg == "content"]
            if not (content and isinstance(content[0], ast.Constant) and content[0].value is False):
                yield function.name, node.lineno


def test_content_is_hashed_at_a_start_and_in_a_rewind_only() -> None:
    found = {
        (path.name, function)
        for path in TRAINING.rglob("*.py")
        for function, _ in hashing_calls(ast.parse(path.read_text()))
    }
    assert found == {
        ("attempt.py", "checkpoint_to_resume"),
        ("attempt.py", "_find_checkpoint"),
        ("finish.py", "finish_again"),  # a start of a run that is finished
        ("checkpoint.py", "go_back"),
    }
    source = (TRAINING / "callbacks" / "checkpoint.py").read_text()
    rewind = source[source.index("def go_back") :]
    assert 0 < rewind.index("self.waiting(") < rewind.index("newest(")
