"""A rank's heartbeat: a few numbers in memory that the rank shares with its guard, written in some microseconds.

The guard reads them whatever the rank does, also while it is stopped.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from dataclasses import dataclass

from rwkv_train.watchdog.verdict import Phase

_FORMAT = struct.Struct("<QQQQQQdddd")
_VERSION = struct.Struct("<Q")
SIZE = _VERSION.size * 2 + _FORMAT.size


@dataclass
class Beat:
    """The content.

    Args:
        step, place, index, phase: where the rank is; see Report.
        paced: steps that were done.
        count: of beats.
        since: when it came there; all times are seconds of time.monotonic(), which a machine's processes share.
        writing: since when a checkpoint has been on its way to the disk; 0: none is.
        pace: seconds of a step, the mean of the last ones (each counts a tenth), without the very first.
        work: seconds of the rank's own work in the last one.
        alive: when a thread of the rank last ran.
    """

    step: int = 0
    place: int = 0
    index: int = 0
    phase: int = Phase.STARTUP
    paced: int = 0
    count: int = 0
    since: float = 0.0
    writing: float = 0.0
    pace: float = 0.0
    work: float = 0.0
    alive: float = 0.0


class Heartbeat:
    """The rank's side; `alive` may be called by another thread.

    Attributes:
        fd: of the memory, to be inherited by the guard.
    """

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("rwkv_train heartbeat")
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        os.ftruncate(self.fd, 2 * SIZE)
        self._memory = mmap.mmap(self.fd, 2 * SIZE)
        self._beat = Beat(since=time.monotonic())
        self._store()
        self.alive()

    def beat(self, phase: Phase, step: int, index: int = 0) -> None:
        """The rank has come to the next place: another phase, another batch or another step."""
        beat = self._beat
        if step != beat.step:
            beat.place = 0
        elif phase != beat.phase:
            beat.place += 1
        beat.step, beat.phase, beat.index, beat.since = step, phase, index, time.monotonic()
        beat.count += 1
        self._store()

    def stepped(self, seconds: float, work: float) -> None:
        """What the last step took; goes out with the next beat."""
        beat = self._beat
        beat.paced, beat.work = beat.paced + 1, work
        if beat.paced > 1:
            beat.pace = seconds if beat.paced == 2 else 0.9 * beat.pace + 0.1 * seconds

    def writing(self, since: float) -> None:
        """A checkpoint has begun to be written, or (0) all of it is there."""
        self._beat.writing = since

    def alive(self) -> None:
        """Some thread of the rank runs."""
        _VERSION.pack_into(self._memory, SIZE, int(time.monotonic() * 1e6))

    def _store(self) -> None:
        beat = self._beat
        _VERSION.pack_into(self._memory, 0, 2 * beat.count + 1)  # odd: being written
        whole = (beat.step, beat.place, beat.index, beat.phase, beat.paced, beat.count)
        _FORMAT.pack_into(self._memory, _VERSION.size, *whole, beat.since, beat.writing, beat.pace, beat.work)
        _VERSION.pack_into(self._memory, _VERSION.size + _FORMAT.size, 2 * beat.count)
        _VERSION.pack_into(self._memory, 0, 2 * beat.count)

    def close(self) -> None:
        self._memory.close()
        os.close(self.fd)


class Listener:
    """The guard's side."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 2 * SIZE, prot=mmap.PROT_READ)
        self._last = Beat()

    def read(self) -> Beat:
        """The newest whole beat."""
        for _ in range(100):
            first = _VERSION.unpack_from(self._memory, 0)[0]
            values = _FORMAT.unpack_from(self._memory, _VERSION.size)
            last = _VERSION.unpack_from(self._memory, _VERSION.size + _FORMAT.size)[0]
            if first == last == _VERSION.unpack_from(self._memory, 0)[0] and first % 2 == 0:
                self._last = Beat(*values)
                break
        self._last.alive = _VERSION.unpack_from(self._memory, SIZE)[0] / 1e6
        return self._last
