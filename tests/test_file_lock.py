"""Locks between processes, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from rwkv_train.file_lock import lock
from rwkv_train.rundir.directory import RunDirectory


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert lock(first)
        assert not lock(second)
        first.close()
        assert lock(second)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is not refused as "in use by another process": it says what nobody guards against."""

    def refuse(file: object, how: int) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunDirectory(str(tmp_path), "run").claimed(first=True):
        pass
    assert "run/.lock cannot be locked (no locks): make sure that no second process uses it" in capsys.readouterr().err


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open(tmp_path / "lock", "w") as file, pytest.raises(OSError, match="broken"):
        lock(file)
