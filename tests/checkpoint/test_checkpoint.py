"""Checkpoints and disk faults: damage is detected and reported, and the run resumes from an intact checkpoint."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from rwkv_train.checkpoint.directory import list_checkpoints, newest, read_meta, verify
from rwkv_train.checkpoint.storage import LocalStorage
from rwkv_train.cli import launcher
from rwkv_train.errors import UserError
from rwkv_train.exit_codes import ExitCode
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows, same_weights, start_ranks, train_ranks

NINE_STEPS = ("budget.steps=9", "checkpoint.every.steps=3", "validation.every.steps=100")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text and a finished run of nine steps, three checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(launcher.load(overrides_for(folder, "run", *NINE_STEPS))) == 0
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The folder again, as if the run had been stopped after its sixth step."""
    shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "runs" / "run" / "checkpoints" / "step_000000009-0001")
    return tmp_path / "copy"


def resume(folder: Path, *overrides: str) -> int:
    text = f"data.path={folder / 'text.txt'}"
    return train(launcher.load(overrides_for(folder, "run", *NINE_STEPS, text, "run.allow_changes=true", *overrides)))


class Full(LocalStorage):
    """A disk that takes so many files and is full then."""

    def __init__(self, files: int) -> None:
        self.files = files

    @contextmanager
    def write(self, path: Path) -> Iterator[BinaryIO]:
        self.files -= 1
        with super().write(path) as file:
            if self.files < 0:
                file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            yield file


@pytest.mark.parametrize("files", [0, 4, 6])
def test_a_full_disk_costs_checkpoints_not_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], files: int
) -> None:
    assert train(launcher.load(overrides_for(tmp_path, "run", *NINE_STEPS)), Full(files)) == 3
    run = tmp_path / "runs" / "run"
    assert len(losses(run)) == 9  # training continued
    kept, damaged = newest(run / "checkpoints")
    assert not damaged
    assert (None if kept is None else kept.name) == ("step_000000003-0001" if files else None)
    left = {path.name for path in (run / "checkpoints").iterdir()} - {"latest"}
    assert left == ({kept.name} if kept else set())
    printed = capfd.readouterr()
    assert "could not be written: No space left on device" in printed.err
    assert f"the last complete checkpoint is {kept or 'none'}" in printed.err
    assert "WARNING: the disk refused" in printed.out
    assert "checkpoint_failed" in [row["event"] for row in rows(run, "events.jsonl")]


def test_what_a_checkpoint_holds(whole: Path) -> None:
    run = whole / "runs" / "run"
    path = run / "checkpoints" / "step_000000009-0001"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "meta.json", "state.pth", "weights.pth"]
    weights = torch.load(path / "weights.pth", weights_only=True)
    final = torch.load(run / "weights.pth", weights_only=True)
    assert all(torch.equal(weights[name], final[name]) for name in final)
    state = torch.load(path / "state.pth", weights_only=True)
    assert set(state["exp_avg"]) == set(state["exp_avg_sq"]) == set(weights)  # keyed by name
    meta = read_meta(path)
    assert (meta.step, meta.tokens, meta.updates) == (9, 9 * 128, 9)
    assert meta.config["model"]["n_embd"] == 32
    assert meta.shapes["emb.weight"] == (256, 32)


def test_the_newest_stay(whole: Path, tmp_path: Path) -> None:
    assert (
        train(
            launcher.load(overrides_for(tmp_path, "run", *NINE_STEPS, "checkpoint.every.steps=1", "checkpoint.keep=2"))
        )
        == 0
    )
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_000000008-0001", "step_000000009-0001"]
    assert (checkpoints / "latest").read_text() == "step_000000009-0001"


@pytest.mark.parametrize("file", ["weights.pth", "state.pth", "meta.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_seen(copy: Path, file: str, harm: str) -> None:
    checkpoints = copy / "runs" / "run" / "checkpoints"
    path = checkpoints / "step_000000006-0001" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if harm == "truncated" else content)
    if (file, harm) != ("manifest.json", "flipped"):  # there, a flipped blank may do no harm
        assert verify(path.parent) is not None
        found, damaged = newest(checkpoints)
        assert found is not None
        assert found.name == "step_000000003-0001"
        assert [damage.path.name for damage in damaged] == ["step_000000006-0001"]


def test_resume_passes_over_the_damaged_one_and_says_so(
    whole: Path, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copy / "runs" / "run"
    with open(run / "checkpoints" / "step_000000006-0001" / "weights.pth", "r+b") as file:
        file.truncate(1000)
    assert resume(copy) == 0
    printed = capfd.readouterr().out
    assert "damaged checkpoint skipped: " in printed
    assert "step_000000006-0001: weights.pth has 1000 bytes" in printed
    assert losses(run) == losses(whole / "runs" / "run")
    assert same_weights(run, whole / "runs" / "run")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The exit code is one that nobody restarts, and nothing of the run changes; a dry run says the same."""
    run = copy / "runs" / "run"
    for path in (run / "checkpoints").glob("step_*/weights.pth"):
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    overrides = overrides_for(copy, "run", *NINE_STEPS, f"data.path={copy / 'text.txt'}", "run.allow_changes=true")
    before = sorted(path for path in run.rglob("*") if path.name != ".lock")
    assert launcher.main(overrides) == ExitCode.USER_ERROR
    printed = capfd.readouterr().err
    assert "are damaged: step_000000006-0001: weights.pth has other content than was written; step_000000003" in printed
    assert sorted(path for path in run.rglob("*") if path.name != ".lock") == before
    for path in (run / "checkpoints").glob("step_*/weights.pth"):
        path.unlink()
    assert launcher.main([*overrides, "dry_run=true"]) == ExitCode.USER_ERROR


def test_ranks_agree_about_damage_that_only_rank_0_sees(copy: Path, whole: Path) -> None:
    """It hashes the content, the others do not: for them the run would be finished, or resumable."""
    run = copy / "runs" / "run"
    overrides = overrides_for(copy, "run", *NINE_STEPS, f"data.path={copy / 'text.txt'}", "strategy=ddp")
    overrides = [*overrides, "run.allow_changes=true", "budget.steps=6"]

    def damage(step: int) -> None:
        for path in (run / "checkpoints").glob(f"step_{step:09d}-*/weights.pth"):
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(content)

    damage(6)
    train_ranks(overrides, 2)
    assert rows(run, "events.jsonl")[-1]["event"] == "finished"
    assert losses(run)[:6] == pytest.approx(losses(whole / "runs" / "run")[:6], rel=1e-6)
    for step in (3, 6):
        damage(step)
    processes = start_ranks(overrides, 2)
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [2, 2]
    assert rows(run, "events.jsonl")[-1]["event"] == "finished"


def test_a_finished_run_says_so(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in (whole / "runs").rglob("*") if path.is_file())
    assert train(launcher.load(overrides_for(whole, "run", *NINE_STEPS))) == 0
    assert "is finished: 9 of 9 steps" in capfd.readouterr().out
    after = sorted((path, path.stat().st_mtime_ns) for path in (whole / "runs").rglob("*") if path.is_file())
    assert [entry for entry in after if entry[0].name != ".lock"] == [e for e in before if e[0].name != ".lock"]


def test_what_a_finished_run_lacks_is_made_by_the_next_call(whole: Path, tmp_path: Path) -> None:
    """Its process may have ended between the last checkpoint and the last file, or a file was lost since."""
    shutil.copytree(whole, tmp_path / "copy")
    run = tmp_path / "copy" / "runs" / "run"
    for name in ("weights.pth", "loss.png"):
        (run / name).unlink()
    again = overrides_for(tmp_path / "copy", "run", *NINE_STEPS, "samples.tokens=8", "run.allow_changes=true")
    assert train(launcher.load(again)) == 0
    assert same_weights(run, whole / "runs" / "run")
    assert (run / "loss.png").stat().st_size > 1000
    assert (run / "samples.txt").read_text().startswith("===== after 9 steps =====\n")
    assert [row["event"] for row in rows(run, "events.jsonl")][-2:] == ["resumed", "finished"]
    assert losses(run) == losses(whole / "runs" / "run")
    before = (run / "events.jsonl").read_bytes()
    assert train(launcher.load(again)) == 0
    assert (run / "events.jsonl").read_bytes() == before


def test_the_probe_refuses_other_weights(copy: Path) -> None:
    """Weights with a valid checksum that are not those that gave the saved loss."""
    path = copy / "runs" / "run" / "checkpoints" / "step_000000006-0001"
    weights = torch.load(path / "weights.pth", weights_only=True)
    weights["head.weight"] *= 1.001
    torch.save(weights, path / "weights.pth")
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / "weights.pth").read_bytes()
    manifest["files"]["weights.pth"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the loss of the probe sample under the saved weights is"):
        resume(copy)


def test_from_an_older_checkpoint_on_the_newer_ones_do_not_count(
    whole: Path, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The start names them, and the first save deletes them."""
    run = copy / "runs" / "run"
    assert resume(copy, f"resume={run / 'checkpoints' / 'step_000000003-0001'}") == 0
    assert losses(run) == losses(whole / "runs" / "run")
    assert "no longer count, deleted after the next save: step_000000006-0001\n" in capfd.readouterr().out
    assert not (run / "checkpoints" / "step_000000006-0001").exists()
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [
        "step_000000003-0001",
        "step_000000006-0002",
        "step_000000009-0002",
    ]


def test_other_data_and_other_settings_are_named(copy: Path) -> None:
    overrides = overrides_for(copy, "run", *NINE_STEPS, f"data.path={copy / 'text.txt'}", "optim.clip=0.5")
    with pytest.raises(UserError, match=r"another config: .*optim\.clip: 1\.0 → 0\.5") as caught:
        train(launcher.load(overrides))
    assert "run.allow_changes=true" in str(caught.value)
    (copy / "text.txt").write_text((copy / "text.txt").read_text().replace("a", "e"))
    with pytest.raises(UserError, match="the data itself: content hash"):
        train(launcher.load(overrides_for(copy, "run", *NINE_STEPS)))


def test_a_checkpoint_of_another_shape_names_the_tensors(whole: Path, tmp_path: Path) -> None:
    checkpoint = whole / "runs" / "run" / "checkpoints" / "step_000000009-0001"
    overrides = overrides_for(tmp_path, "new", *NINE_STEPS, "model.n_embd=48", f"resume={checkpoint}")
    with pytest.raises(UserError, match=r"emb\.weight has shape \(256, 32\), this model \(256, 48\)"):
        train(launcher.load(overrides))
    assert not (tmp_path / "runs").exists()


def test_a_directory_in_use(copy: Path) -> None:
    import fcntl

    with open(copy / "runs" / "run" / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"is in use by another process \(pid \d+ on"):
            resume(copy)
