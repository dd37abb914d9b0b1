"""Ranks that do not find each other end in time, whatever torch waits for; so does a rank whose parent has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_train.cluster.rendezvous import rendezvous

# torch's own wait: native code, in which no Python handler runs
WAIT = """
import signal, socket, sys, torch
from rwkv_train.cluster.rendezvous import rendezvous
signal.signal(signal.SIGTERM, lambda *_: None)
with rendezvous(2, seconds=float(sys.argv[1])):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print("waits", flush=True)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
"""

ORPHAN = """
import os, subprocess, sys
child = "import os, sys, time; from rwkv_train.cluster.rendezvous import follow_parent; follow_parent(os.getppid());" \
    "print(os.getpid(), flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
print(process.stdout.readline().decode(), flush=True)
os._exit(0)
"""


def test_a_rank_that_never_comes() -> None:
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", WAIT, "1"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "waits\n")
    assert ended.stderr == "error: the 2 ranks of the run did not find each other in 1 s\n"
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_wait(number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAIT, "600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        time.sleep(0.3)
        process.send_signal(number)
        _, printed = process.communicate(timeout=30)
    assert process.returncode == code
    assert printed == f"{number.name} while the 2 ranks wait for each other: the run ends\n"


def test_nothing_is_left_behind() -> None:
    """Neither a thread nor a descriptor, and a signal that comes while the ranks do find each other ends nothing."""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    files = len(list(Path("/proc/self/fd").iterdir()))
    try:
        with rendezvous(2, seconds=60):
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert signal.set_wakeup_fd(-1) == -1


def test_a_rank_ends_with_its_parent() -> None:
    child = int(subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=True).stdout)
    end = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.1)


STUCK = """
import os, subprocess, sys
child = "import ctypes, os; from rwkv_train.cluster.rendezvous import die_with_parent, outlive_parent;" \
    "die_with_parent(os.getppid()); LATER; print(os.getpid(), flush=True); ctypes.PyDLL(None).sleep(30)"
if sys.argv[1] == "watched":
    child = child.replace("LATER", "outlive_parent()")
process = subprocess.Popen([sys.executable, "-c", child.replace("LATER", "0")], stdout=subprocess.PIPE)
print(process.stdout.readline().decode(), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("until", ["started", "watched"])
def test_a_rank_in_native_code_ends_with_its_parent(until: str) -> None:
    """The interpreter's lock is held there, so that no thread of Python can look after the parent."""
    output = subprocess.run([sys.executable, "-c", STUCK, until], stdout=subprocess.PIPE, text=True, check=True).stdout
    child = int(output)
    end = time.monotonic() + (10 if until == "started" else 0.3)
    while (alive := _alive(child)) and time.monotonic() < end:
        time.sleep(0.01)
    assert alive == (until == "watched")
    if alive:
        os.kill(child, signal.SIGKILL)


def test_a_parent_that_has_ended_before() -> None:
    code = "from rwkv_train.cluster.rendezvous import die_with_parent; die_with_parent(1 << 22)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == (1 if sys.platform == "linux" else 0)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
