"""`rwkv-train prepare` that is killed, or whose disk is full: what is finished stays, and no process is left."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from rwkv_train.data import workers
from rwkv_train.data.prepare import pipeline, prepare, units
from rwkv_train.data.prepare.shards import Shard, ShardCounts, make_shard
from rwkv_train.data.prepare.units import Unit
from rwkv_train.errors import UserError
from tests.data.test_prepare import TEXTS, documents, options, write_jsonl


def disk_full(unit: Unit, shard: Shard, stop_at_broken: bool) -> ShardCounts:
    """Shard 3 finds the disk full if the file `full` exists."""
    if shard.number == 3 and shard.folder.with_name("full").exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(shard.bin))
    return make_shard(unit, shard, stop_at_broken)


@pytest.mark.usefixtures("small_units")
def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "make_shard", disk_full)
    path = write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "full").touch()
    with pytest.raises(
        UserError, match=r"000003.bin cannot be written: No space left on device\n  free disk space; the"
    ):
        prepare(options(tmp_path / "s", path))
    assert not list(tmp_path.glob("s.[bi]*")), "nothing under the final names"
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "s.parts").glob("*.json")}
    assert finished
    (tmp_path / "full").unlink()
    made: list[int] = []
    real = pipeline._submit
    monkeypatch.setattr(pipeline, "_submit", lambda *a: made.append(a[4].number) or real(*a))  # type: ignore[func-returns-value]
    prepare(options(tmp_path / "s", path))
    assert documents(tmp_path / "s") == TEXTS
    assert not {int(file.stem) for file in finished} & set(made), "finished shards are not made again"


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")

    def refuse(file: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_sync", refuse)
        with pytest.raises(UserError, match=r"cannot be written: No space left on device\n.*resumes from the shards"):
            prepare(options(tmp_path / "s", path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "s.parts"]
    prepare(options(tmp_path / "s", path))
    assert documents(tmp_path / "s") == TEXTS


def killed_once(unit: Unit, shard: Shard, stop_at_broken: bool) -> ShardCounts:
    """The process of shard 2 is killed while it writes: once, or every time if the file `always` exists."""
    once = shard.folder.with_name("killed")
    if shard.number == 2 and (not once.exists() or shard.folder.with_name("always").exists()):
        once.touch()
        shard.bin.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return make_shard(unit, shard, stop_at_broken)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_costs_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    monkeypatch.setattr(pipeline, "make_shard", killed_once)
    prepare(options(tmp_path / "s", write_jsonl(tmp_path / "a.jsonl"), workers=workers))
    assert documents(tmp_path / "s") == TEXTS
    assert "a process was killed (out of memory?)" in capsys.readouterr().err
    (tmp_path / "always").touch()
    with pytest.raises(UserError, match=r"was killed 3 times\n.*fewer --workers; the same command resumes"):
        prepare(options(tmp_path / "t", tmp_path / "a.jsonl", workers=workers))


def slow(unit: Unit, shard: Shard, stop_at_broken: bool) -> ShardCounts:
    time.sleep(0.1 if shard.number < 3 else 30)
    return make_shard(unit, shard, stop_at_broken)


def _prepare_slowly(source: Path, out: Path) -> None:
    units.UNIT_BYTES = 3000
    pipeline.make_shard = slow  # type: ignore[attr-defined]
    prepare(options(out, source))


@pytest.mark.usefixtures("small_units")
def test_a_killed_prepare_resumes_and_a_second_one_into_the_same_store_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    process = multiprocessing.get_context("forkserver").Process(target=_prepare_slowly, args=(path, tmp_path / "s"))
    process.start()
    end = time.monotonic() + 60
    while len(list((tmp_path / "s.parts").glob("*.json"))) < 3:
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.05)
    with pytest.raises(
        UserError, match=r"another `prepare` is writing to .*s.parts\n  wait until it ends, or give another --out"
    ):
        prepare(options(tmp_path / "s", path))
    process.kill()
    process.join()
    with pytest.raises(UserError, match=r"has the shards of an unfinished `prepare` of other files or with"):
        prepare(options(tmp_path / "s", path, tokenizer="world"))
    finished = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s.parts").glob("*.json")}
    assert len(finished) == 3
    prepare(options(tmp_path / "s", path))
    assert documents(tmp_path / "s") == TEXTS


def test_a_broken_pool_ends_its_busy_workers_at_once() -> None:
    """A broken executor terminates its other processes and joins them; Python 3.12 and later do nothing else."""
    broken = workers.pool(2, "bytes", ())
    busy = broken.submit(time.sleep, 100)
    while not busy.running():
        time.sleep(0.01)
    started = time.monotonic()
    with pytest.raises(BrokenProcessPool):
        broken.submit(signal.raise_signal, signal.SIGKILL).result()
    broken.shutdown()
    assert time.monotonic() - started < 30
    with pytest.raises(BrokenProcessPool):
        busy.result()


def test_no_end_of_a_pool_waits_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SHUTDOWN_SECONDS", 0.3)
    stuck = workers.pool(1, "bytes", ())
    task = stuck.submit(time.sleep, 600)
    while not task.running():
        time.sleep(0.01)
    (process,) = stuck._processes.values()
    began = time.monotonic()
    stuck.shutdown(cancel_futures=True)
    assert time.monotonic() - began < 20
    process.join(20)
    assert not process.is_alive()


def test_the_end_of_a_pool_does_not_wait_for_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 and later hold it while they join the processes of a broken pool."""
    monkeypatch.setattr(workers, "SHUTDOWN_SECONDS", 0.1)
    locked = workers.pool(1, "bytes", ())
    assert locked.submit(abs, -1).result() == 1
    ending = threading.Thread(target=locked.shutdown, daemon=True)
    with locked._shutdown_lock:
        ending.start()
        ending.join(20)
        assert not ending.is_alive()
    locked.shutdown()


def test_workers_end_with_a_killed_prepare() -> None:
    code = (
        "import os, time; from rwkv_train.data import workers\n"
        "if __name__ == '__main__':\n"
        "    pool = workers.pool(1, 'bytes', ())\n"
        "    print(pool.submit(os.getpid).result(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        process.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "State:\tZ" not in Path(f"/proc/{worker}/status").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_workers_outlive_the_signals_of_a_job() -> None:
    """SLURM signals all processes of a job; the run then saves a checkpoint, and needs its workers for that."""
    code = (
        "import os, psutil; from signal import *; from rwkv_train.data import workers\n"
        "if __name__ == '__main__':\n"
        "    pool = workers.pool(1, 'bytes', ())\n"
        "    worker = pool.submit(os.getpid).result()\n"
        "    for process in psutil.Process().children(recursive=True):\n"
        "        for number in (SIGUSR1, SIGUSR2, SIGTERM): process.send_signal(number)\n"
        "    assert {pool.submit(os.getpid).result() for _ in range(9)} == {worker}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
