"""A process that dies of a fault leaves its stacks in the run directory, and the next start finds them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from rwkv_train.rundir.crash_file import Crash, take_crashes

TRUNCATED = """
import mmap, os, sys
from pathlib import Path
from rwkv_train.rundir.crash_file import crash_file, report_faults
report_faults()
store = Path(sys.argv[1]) / "store.bin"
store.write_bytes(bytes(1 << 20))
with open(store, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
def read():
    return mapped[1 << 19]
with crash_file(Path(sys.argv[1]) / "logs", 3):
    if sys.argv[2] == "inside":
        os.truncate(store, 0)
        read()
assert not os.listdir(Path(sys.argv[1]) / "logs")
os.truncate(store, 0)
read()
"""


def died(folder: Path, where: str) -> str:
    ended = subprocess.run([sys.executable, "-c", TRUNCATED, str(folder), where], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGBUS
    return ended.stderr


def test_a_store_that_is_truncated_under_the_map(tmp_path: Path) -> None:
    assert died(tmp_path, "inside") == ""
    (tmp_path / "logs" / "crash_rank_0004.txt").touch()  # of a rank that was killed
    (tmp_path / "logs" / "rank_0003_node.log").write_text("output")
    kept = tmp_path / "logs" / "crash_rank_0003-before-attempt-0002.txt"
    reason = "Bus error (a file that it had mapped was truncated, or the file system could not read it)"
    assert take_crashes(tmp_path / "logs", 2) == [Crash(3, reason, kept)]
    assert "in read" in kept.read_text()
    assert sorted(path.name for path in kept.parent.iterdir()) == [kept.name, "rank_0003_node.log"]
    assert take_crashes(tmp_path / "logs", 3) == []


def test_outside_of_the_run_it_is_on_standard_error(tmp_path: Path) -> None:
    assert "Fatal Python error: Bus error" in died(tmp_path, "outside")
    assert take_crashes(tmp_path / "logs", 2) == []
