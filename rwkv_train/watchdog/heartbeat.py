"""A rank's heartbeat: a few numbers in memory shared with its monitor, written in some microseconds.

The monitor can read them whatever the rank does, even while it is stopped.
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
_MEAN_WEIGHT = 0.1  # of the newest step in the mean step time


@dataclass
class Beat:
    """The content of a heartbeat. Times are seconds of time.monotonic(), which all processes of a machine share.

    Attributes:
        step: finished optimiser steps.
        phase_number: how many phases of the step came before this one.
        index: number of the micro-batch, or of the validation batch.
        phase: the current phase, a Phase.
        steps_timed: number of steps that this process has done.
        count: number of beats so far.
        since: time of the last beat.
        saving_since: since when a checkpoint has been on its way to the disk; 0: none is.
        step_time: exponential mean of the time of a step, without the very first.
        work: seconds of the rank's own work in its last step.
        alive: when a thread of the rank last ran.
    """

    step: int = 0
    phase_number: int = 0
    index: int = 0
    phase: int = Phase.STARTUP
    steps_timed: int = 0
    count: int = 0
    since: float = 0.0
    saving_since: float = 0.0
    step_time: float = 0.0
    work: float = 0.0
    alive: float = 0.0


class Heartbeat:
    """The rank's side; `alive` may be called by another thread.

    Attributes:
        fd: file descriptor of the shared memory, to be inherited by the monitor.
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
        """The rank has made progress: another phase, batch or step."""
        beat = self._beat
        if step != beat.step:
            beat.phase_number = 0
        elif phase != beat.phase:
            beat.phase_number += 1
        beat.step, beat.phase, beat.index, beat.since = step, phase, index, time.monotonic()
        beat.count += 1
        self._store()

    def step_done(self, seconds: float, work: float) -> None:
        """Records the time of a step and of the rank's own work in it; visible with the next beat."""
        beat = self._beat
        beat.steps_timed, beat.work = beat.steps_timed + 1, work
        if beat.steps_timed > 1:
            first = beat.steps_timed == 2
            beat.step_time = seconds if first else (1 - _MEAN_WEIGHT) * beat.step_time + _MEAN_WEIGHT * seconds

    def saving(self, since: float) -> None:
        """Records since when a checkpoint is on its way to the disk; 0: none is."""
        self._beat.saving_since = since

    def alive(self) -> None:
        """Records that a thread of the rank runs."""
        _VERSION.pack_into(self._memory, SIZE, int(time.monotonic() * 1e6))

    def _store(self) -> None:
        beat = self._beat
        _VERSION.pack_into(self._memory, 0, 2 * beat.count + 1)  # odd: being written
        integers = (beat.step, beat.phase_number, beat.index, beat.phase, beat.steps_timed, beat.count)
        seconds = (beat.since, beat.saving_since, beat.step_time, beat.work)
        _FORMAT.pack_into(self._memory, _VERSION.size, *integers, *seconds)
        _VERSION.pack_into(self._memory, _VERSION.size + _FORMAT.size, 2 * beat.count)
        _VERSION.pack_into(self._memory, 0, 2 * beat.count)

    def close(self) -> None:
        self._memory.close()
        os.close(self.fd)


class HeartbeatReader:
    """The monitor's side.

    Args:
        fd: file descriptor of the shared memory.
    """

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 2 * SIZE, prot=mmap.PROT_READ)
        self._last = Beat()

    def read(self) -> Beat:
        """The newest beat that was completely written."""
        for _ in range(100):
            first = _VERSION.unpack_from(self._memory, 0)[0]
            values = _FORMAT.unpack_from(self._memory, _VERSION.size)
            last = _VERSION.unpack_from(self._memory, _VERSION.size + _FORMAT.size)[0]
            if first == last == _VERSION.unpack_from(self._memory, 0)[0] and first % 2 == 0:
                self._last = Beat(*values)
                break
        self._last.alive = _VERSION.unpack_from(self._memory, SIZE)[0] / 1e6
        return self._last
