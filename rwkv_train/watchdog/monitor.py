"""The process beside each rank that watches it: `python -m rwkv_train.watchdog.monitor SETTINGS`.

A process, because nothing inside the rank can be relied on: SIGSTOP halts all of its threads, and one that waits for a
device or a disk may hold the interpreter's lock. One for each rank and not for each node, because then it is its rank's
child and nobody needs to find out who starts it, who ends it, and what becomes of it when that one dies. It is small (a
bare interpreter, about 10 MB), wakes once a second, and ends when its rank does, which it sees at once: the other end
of its pipe is the rank's alone.

Rank 0's guard is the coordinator and listens on a socket; the others' report to it once a second and get the verdict as
the answer (watch.py). A verdict has every guard write down its rank's stacks, by py-spy from outside, and end its rank:
first by a word to a thread of it, that leaves with exit code 76, after some seconds by SIGKILL. Nothing but the
standard library is imported here.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rwkv_train.exit_codes import ExitCode
from rwkv_train.watchdog.heartbeat import Listener
from rwkv_train.watchdog.verdict import Coordinator, Limits, Member, Phase, Report, Stragglers, Verdict, limit

TICK = 1.0  # seconds between two looks
LENIENT = 10  # times the limits, where there is one rank alone
GAP = 5.0  # seconds by which a look comes too late when this process itself was stopped
DUMP = 10.0  # seconds that py-spy may take
PATIENCE = 5.0  # seconds that a rank has for its last word before SIGKILL
LAST = 2.0  # seconds by which a guilty rank ends after the others


class Line:
    """A socket or pipe that carries a JSON object per line, both ways, and never blocks."""

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self.channel, self.open = channel, True
        self._came, self._goes = b"", b""

    def read(self) -> Iterator[dict[str, Any]]:
        """What has come; `open` is False once nothing more can come."""
        try:
            while data := self.channel.recv(1 << 16):
                self._came += data
            self.open = False
        except BlockingIOError:
            pass
        except OSError:
            self.open = False
        *lines, self._came = self._came.split(b"\n")
        for line in lines:
            with suppress(ValueError):
                if isinstance(message := json.loads(line), dict):  # a stranger may have found the port
                    yield message

    def write(self, message: dict[str, Any]) -> None:
        """Sends what fits now; the rest goes with the next message."""
        self._goes += json.dumps(message).encode() + b"\n"
        try:
            self._goes = self._goes[self.channel.send(self._goes) :]
        except BlockingIOError:
            pass
        except OSError:
            self.open = False


class Rank:
    """The process that is watched, seen from outside."""

    def __init__(self, pid: int, heart: Listener, limits: Limits, alone: bool) -> None:
        self.pid, self.heart, self.limits = pid, heart, limits
        self.alone = alone  # nobody waits for a rank that is alone: it may be stopped by Ctrl-Z, or in a debugger
        self.number, self.node = 0, ""
        self.ended: str | None = None
        self._stopped: float | None = None
        self._excused = 0.0  # until when standing still does not count

    def excuse(self, now: float) -> None:
        """This guard itself was stopped, and the rank probably with it: both begin anew."""
        self._excused, self._stopped = now, None

    def report(self, now: float) -> Report:
        beat, state = self.heart.read(), self._state()
        if state not in "Tt":
            self._stopped = None
        elif self.alone:
            self.excuse(now)
        elif self._stopped is None:
            self._stopped = now
        return Report(
            self.number,
            self.node,
            beat.step,
            beat.place,
            beat.index,
            beat.phase,
            still=now - max(beat.since, self._excused),
            limit=limit(self.limits, beat.phase, beat.paced, beat.pace) * (LENIENT if self.alone else 1),
            stopped=0.0 if self._stopped is None else now - self._stopped,
            frozen=now - max(beat.alive, self._excused),
            state=state,
            writing=now - beat.writing if beat.writing else 0.0,
            work=beat.work,
            ended=self.ended,
        )

    def _state(self) -> str:
        """As the kernel names it; of a thread that waits for a disk, if there is one."""
        try:
            states = [
                path.read_text().rsplit(")")[-1].split()[0] for path in Path(f"/proc/{self.pid}/task").glob("*/stat")
            ]
        except OSError:
            return "S"
        return "D" if "D" in states and "T" not in states else max(states, key="SRTt".find, default="S")


class Monitor:
    """The loop.

    Args:
        settings: pid, alone, memory and listener (file descriptors), limits, stragglers (factor, steps), py_spy (path).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.limits = Limits(**settings["limits"])
        self.rank = Rank(settings["pid"], Listener(settings["memory"]), self.limits, settings["alone"])
        self.settings = settings
        self.words = Line(socket.socket(fileno=settings["words"]))  # with the rank
        self.server = None if settings["listener"] is None else socket.socket(fileno=settings["listener"])
        self.stragglers = Stragglers(*settings["stragglers"])
        self.member: Member | None = None
        self.coordinator: Coordinator | None = None
        self.upwards: Line | None = None  # to the coordinator
        self.members: list[Line] = []
        self.directory: Path | None = None
        self.token, self.address = "", ("", 0)
        self.slow_save = False
        self.writes = False  # whether watchdog.jsonl is this guard's

    def run(self) -> None:
        """Until the rank has ended."""
        selector, looked = selectors.DefaultSelector(), time.monotonic()
        selector.register(self.words.channel, selectors.EVENT_READ)
        if self.server is not None:
            self.server.setblocking(False)
            selector.register(self.server, selectors.EVENT_READ)
        due = looked
        while True:
            for key, _ in selector.select(max(0.0, due - time.monotonic())):
                if key.fileobj is self.server:
                    with suppress(OSError):
                        self.members.append(Line(self.server.accept()[0]))
            self._hear_rank()
            now = time.monotonic()
            if now - due > GAP:
                self._skip(now, now - due)
            due = now + TICK if now >= due else due
            verdict = self._look(now)
            if verdict is not None:
                self._end(verdict)
                return
            if self.rank.ended is not None:
                if self.coordinator is None or self.coordinator.over or self.rank.ended == "":
                    self._leave()
                    return
                with suppress(KeyError):  # rank 0 has failed: the others are judged before this one leaves
                    selector.unregister(self.words.channel)

    def _hear_rank(self) -> None:
        for word in self.words.read():
            if "join" in word:
                self._join(**word["join"])
            elif "directory" in word:
                self.directory, self.writes = Path(word["directory"]), False
            elif "ended" in word:
                self.rank.ended = word["ended"]
        if self.rank.ended is None and (not self.words.open or os.getppid() != self.rank.pid):
            self.rank.ended = "it died without a word (killed, out of memory, or a crash)"

    def _join(self, rank: int, ranks: int, node: str, directory: str, address: list[Any], token: str) -> None:
        now = time.monotonic()
        self.rank.number, self.rank.node = rank, node
        self.directory, self.address, self.token = Path(directory), (address[0], address[1]), token
        if rank == 0:
            self.coordinator = Coordinator(ranks, self.limits, now)
        else:
            self.member = Member(rank, now)

    def _skip(self, now: float, seconds: float) -> None:
        self.rank.excuse(now)
        for judge in (self.coordinator, self.member):
            if judge is not None:
                judge.skip(seconds)

    def _look(self, now: float) -> Verdict | None:
        report = self.rank.report(now)
        if self.coordinator is not None:
            self.coordinator.hear(report, now)
            self._hear_members(self.coordinator, now)
            self._tell_slow(self.coordinator)
            return self.coordinator.judge(now)
        if self.member is not None:
            self._talk(self.member, report, now)
            if not self.member.released:
                return self.member.judge(now)
        if report.ended is None and report.still > report.limit:  # the others are not there yet, or no more
            doing = Phase(report.phase).told
            reason = f"rank {self.rank.number} alone: its {doing} did not come to an end in {report.limit:.0f} s"
            return Verdict([self.rank.number], report.step, reason)
        return None

    def _hear_members(self, coordinator: Coordinator, now: float) -> None:
        for line in self.members:
            for message in line.read():
                if message.pop("token", None) == self.token:
                    coordinator.hear(Report(**message), now)
                    verdict = coordinator.verdict
                    line.write({} if verdict is None else verdict.as_json())
        self.members = [line for line in self.members if line.open]

    def _talk(self, member: Member, report: Report, now: float) -> None:
        if self.upwards is None or not self.upwards.open:
            with suppress(OSError):
                self.upwards = Line(socket.create_connection(self.address, timeout=TICK))
        if self.upwards is not None:
            self.upwards.write({**report.as_json(), "token": self.token})
            for answer in self.upwards.read():
                member.hear(answer, now)

    def _tell_slow(self, coordinator: Coordinator) -> None:
        reports = coordinator.reports
        for report, times in self.stragglers.hear(reports):
            self._event("straggler", report.step, rank=report.rank, node=report.node, times=round(times, 2))
            self._say(
                f"rank {report.rank} on {report.node} is a straggler: its own work in a step takes "
                f"{times:.1f} times as long as the others'"
            )
        slow = max(reports.values(), key=lambda report: report.writing, default=None)
        if slow is None or not slow.writing:
            self.slow_save = False
        elif slow.writing > max(self.limits.floor, self.limits.checkpoint / 10) and not self.slow_save:
            self.slow_save = True
            self._event("checkpoint_slow", slow.step, rank=slow.rank, node=slow.node, seconds=round(slow.writing, 1))
            self._say(f"rank {slow.rank} on {slow.node} has been writing a checkpoint for {slow.writing:.0f} s")

    def _say(self, text: str) -> None:
        print(f"\nWATCHDOG: {text}", file=sys.stderr, flush=True)

    def _event(self, event: str, step: int, **fields: Any) -> None:
        """A row of watchdog.jsonl, by the one guard that has made the file."""
        if self.directory is None:
            return
        row = {"time": round(time.time(), 3), "event": event, "step": step, **fields}
        with suppress(OSError), open(self.directory / "watchdog.jsonl", "a" if self.writes else "x") as file:
            self.writes = True
            file.write(json.dumps(row) + "\n")

    def _end(self, verdict: Verdict) -> None:
        """Tells everybody, writes stacks down, ends the rank."""
        for line in self.members:
            line.write(verdict.as_json())
        missing = self._dump_stacks(verdict) if self.rank.ended is None else None
        if self.rank.number in (0, *verdict.ranks[:1]) or self.member is None:
            where = "" if self.directory is None else f"\n  stacks: {self.directory}/stacks_rank_*.txt"
            again = f"the run ends with exit code {ExitCode.HUNG}: the same command goes on"
            self._say(f"{verdict.reason}{where}\n  {again}")
        if self.member is None or 0 in verdict.ranks:
            self._event("failed", verdict.step, reason=f"watchdog: {verdict.reason}", ranks=list(verdict.ranks))
        self._await_stacks(verdict)
        if self.rank.ended is not None:
            return
        if self.rank.number in verdict.ranks and not self.rank.alone:
            time.sleep(LAST)  # its end is what the others would see first, as a broken connection
        self.words.write({"end": ExitCode.HUNG, "stacks": None if missing is None else str(missing)})
        with suppress(ProcessLookupError):
            os.kill(self.rank.pid, signal.SIGCONT)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.rank.ended is None:
            time.sleep(0.05)
            self._hear_rank()
        with suppress(ProcessLookupError):
            if self.rank.ended is None:
                os.kill(self.rank.pid, signal.SIGKILL)

    def _await_stacks(self, verdict: Verdict) -> None:
        """Returns when all guards have written their rank's stacks: the end of one rank may be the end of all."""
        end, ready = time.monotonic() + DUMP, False
        done: set[Line] = set()
        if self.upwards is not None:
            self.upwards.write({"token": self.token, "done": True})
        while not ready and time.monotonic() < end:
            if self.server is not None:
                with suppress(OSError):
                    self.members.append(Line(self.server.accept()[0]))
                for line in self.members:
                    for message in line.read():
                        if message.get("token") == self.token and "done" in message:
                            done.add(line)
                        else:
                            line.write(verdict.as_json())
                self.members = [line for line in self.members if line.open]
                ready = all(line in done for line in self.members)
            elif self.upwards is not None:
                ready = any("go" in answer for answer in self.upwards.read()) or not self.upwards.open
            else:
                ready = True
            time.sleep(0.05)
        for line in self.members:
            line.write({"go": True})

    def _dump_stacks(self, verdict: Verdict) -> Path | None:
        """Writes the rank's stacks; returns the file where the rank itself shall add them, since py-spy could not."""
        if self.directory is None:
            return None
        path = self.directory / f"stacks_rank_{self.rank.number:04d}.txt"
        tool, why = self.settings["py_spy"], "py-spy is not installed"
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            file.write(f"{verdict.reason}\n\n")
            file.flush()
            if tool is not None:
                command = [tool, "dump", "--nonblocking", "--pid", str(self.rank.pid)]
                try:
                    done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, timeout=DUMP, check=False)
                    if done.returncode == 0:
                        return None
                    why = done.stderr.decode(errors="replace").strip()
                except (OSError, subprocess.TimeoutExpired) as error:
                    why = str(error)
            file.write(f"py-spy: {why}\n")
        return path

    def _leave(self) -> None:
        """The rank came to its end, or has told why it failed."""
        if self.upwards is not None and self.member is not None:
            self._talk(self.member, self.rank.report(time.monotonic()), time.monotonic())
        for line in self.members:
            line.write({"bye": True})


def main() -> None:
    """Watches the process that has started this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the rank
    Monitor(json.loads(sys.argv[1])).run()


if __name__ == "__main__":
    main()
