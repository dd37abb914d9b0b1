"""The process beside each rank that monitors it: `python -m rwkv_train.watchdog.monitor SETTINGS`.

It is a process, because nothing inside the rank can be relied on: SIGSTOP halts all of its threads, and one that waits
for a device or a disk may hold the interpreter's lock. There is one for each rank, not for each node: as a child of its
rank it needs no other process to start or end it, and sees the rank's end at once as the end of a pipe. It is small (a
bare interpreter, about 10 MB), wakes once a second, and imports nothing but the standard library.

The monitor of rank 0 is the coordinator and listens on a socket (connection.py); the others report to it once a second
and get the verdict in the answer (verdict.py). On a verdict every monitor writes its rank's stacks, by py-spy from
outside, and ends its rank: first by a message to a thread of it, which exits with code 76, then by SIGKILL.
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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rwkv_train.exit_codes import ExitCode
from rwkv_train.watchdog.connection import Entrance, JsonSocket
from rwkv_train.watchdog.heartbeat import HeartbeatReader
from rwkv_train.watchdog.verdict import Coordinator, Limits, Member, Phase, RankReport, Stragglers, Verdict, phase_limit

POLL_SECONDS = 1.0  # seconds between two observations of the rank
SINGLE_RANK_FACTOR = 10  # by which all limits are larger where there is one rank only
STOPPED_AFTER = 5.0  # seconds by which a tick is late when this process itself was stopped
STACK_TIMEOUT = 10.0  # seconds that py-spy, or all monitors together, may take for the stacks
EXIT_TIMEOUT = 5.0  # seconds that a rank has to exit before SIGKILL
CULPRIT_DELAY = 2.0  # seconds by which a culprit ends after the other ranks


class MonitoredRank:
    """The monitored process, seen from outside.

    Args:
        pid: its process id.
        heartbeat: its heartbeat.
        limits: the settings.
        alone: whether it is the only rank: no other rank waits for it, and it may be stopped by Ctrl-Z or a debugger.

    Attributes:
        number: number of the rank.
        node: name of its node.
        ended: as in RankReport.
    """

    def __init__(self, pid: int, heartbeat: HeartbeatReader, limits: Limits, alone: bool) -> None:
        self.pid, self.heartbeat, self.limits, self.alone = pid, heartbeat, limits, alone
        self.number, self.node = 0, ""
        self.ended: str | None = None
        self._stopped_since: float | None = None
        self._excused_until = 0.0  # time without progress counts from here

    def excuse(self, now: float) -> None:
        """This monitor itself was stopped, and probably the rank with it: durations count from now."""
        self._excused_until, self._stopped_since = now, None

    def report(self, now: float) -> RankReport:
        beat, state = self.heartbeat.read(), self._state()
        if state not in "Tt":
            self._stopped_since = None
        elif self.alone:
            self.excuse(now)
        elif self._stopped_since is None:
            self._stopped_since = now
        limit = phase_limit(self.limits, beat.phase, beat.steps_timed, beat.step_time)
        return RankReport(
            self.number,
            self.node,
            beat.step,
            beat.phase_number,
            beat.index,
            beat.phase,
            in_phase=now - max(beat.since, self._excused_until),
            limit=limit * (SINGLE_RANK_FACTOR if self.alone else 1),
            stopped=0.0 if self._stopped_since is None else now - self._stopped_since,
            frozen=now - max(beat.alive, self._excused_until),
            state=state,
            saving=now - beat.saving_since if beat.saving_since else 0.0,
            work=beat.work,
            ended=self.ended,
        )

    def _state(self) -> str:
        """The state as the kernel names it; D if any thread waits for a disk."""
        try:
            states = [
                path.read_text().rsplit(")")[-1].split()[0] for path in Path(f"/proc/{self.pid}/task").glob("*/stat")
            ]
        except OSError:
            return "S"
        return "D" if "D" in states and "T" not in states else max(states, key="SRTt".find, default="S")


class Monitor:
    """The main loop of a monitor process.

    Args:
        settings: pid, alone, memory, channel and listener (file descriptors), limits, stragglers (factor, steps) and
            py_spy (path).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.limits = Limits(**settings["limits"])
        heartbeat = HeartbeatReader(settings["memory"])
        self.rank = MonitoredRank(settings["pid"], heartbeat, self.limits, settings["alone"])
        self.py_spy: str | None = settings["py_spy"]
        self.channel = JsonSocket(socket.socket(fileno=settings["channel"]))  # with the rank
        self.server = None if settings["listener"] is None else socket.socket(fileno=settings["listener"])
        self.selector = selectors.DefaultSelector()
        self.entrance: Entrance | None = None  # from when the token is known
        self.stragglers = Stragglers(*settings["stragglers"])
        self.member: Member | None = None
        self.coordinator: Coordinator | None = None
        self.to_coordinator: JsonSocket | None = None
        self.members: list[JsonSocket] = []
        self.directory: Path | None = None
        self.token, self.address = "", ("", 0)
        self.reported_slow_save = False
        self.owns_events = False  # whether this monitor has created watchdog.jsonl

    def run(self) -> None:
        """Monitors until the rank has ended."""
        due = time.monotonic()
        self.selector.register(self.channel.channel, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select(max(0.0, due - time.monotonic())):
                if key.fileobj is self.server and self.entrance is not None:
                    self.entrance.accept(time.monotonic())
            self._read_rank()
            now = time.monotonic()
            if now - due > STOPPED_AFTER:
                self._discount(now, now - due)
            due = now + POLL_SECONDS if now >= due else due
            verdict = self._look(now)
            if verdict is not None:
                self._end_run(verdict)
                return
            if self.rank.ended is not None:
                if self.coordinator is None or self.coordinator.over or self.rank.ended == "":
                    self._release_members()
                    return
                with suppress(KeyError):  # rank 0 has failed: the other ranks are judged before this monitor ends
                    self.selector.unregister(self.channel.channel)

    def _read_rank(self) -> None:
        """Reads the messages of the rank, and notices its end."""
        for message in self.channel.read():
            if "join" in message:
                self._join(**message["join"])
            elif "directory" in message:
                self.directory, self.owns_events = Path(message["directory"]), False
            elif "ended" in message:
                self.rank.ended = message["ended"]
        if self.rank.ended is None and (not self.channel.open or os.getppid() != self.rank.pid):
            self.rank.ended = "it died without a message (killed, out of memory, or a crash)"

    def _join(self, rank: int, ranks: int, node: str, directory: str, address: list[Any], token: str) -> None:
        """The rank knows its number now, and where the coordinator listens."""
        now = time.monotonic()
        self.rank.number, self.rank.node = rank, node
        self.directory, self.address, self.token = Path(directory), (address[0], address[1]), token
        if rank == 0:
            self.coordinator = Coordinator(ranks, self.limits, now)
            if self.server is not None:
                self.entrance = Entrance(self.server, token)
                self.selector.register(self.server, selectors.EVENT_READ)
        else:
            self.member = Member(rank, now)

    def _discount(self, now: float, seconds: float) -> None:
        """This process was stopped for so long."""
        self.rank.excuse(now)
        for judge in (self.coordinator, self.member):
            if judge is not None:
                judge.discount(seconds)

    def _look(self, now: float) -> Verdict | None:
        """One look at the rank, and the exchange with the other monitors."""
        report = self.rank.report(now)
        if self.coordinator is not None:
            self.coordinator.receive(report, now)
            self._read_members(self.coordinator, now)
            self._report_slow(self.coordinator)
            return self.coordinator.judge(now)
        if self.member is not None:
            self._exchange(self.member, report, now)
            if not self.member.released:
                return self.member.judge(now)
        if report.ended is None and report.in_phase > report.limit:  # the coordinator is not there yet, or not any more
            phase = Phase(report.phase).label
            reason = f"rank {self.rank.number} alone hangs: {phase} for more than {report.limit:.0f} s"
            return Verdict([self.rank.number], report.step, reason)
        return None

    def _read_members(self, coordinator: Coordinator, now: float) -> None:
        if self.entrance is not None:
            self.members += self.entrance.admitted(now)
        for member in self.members:
            for message in member.read():
                report = RankReport.parse(message, coordinator.ranks)
                if report is not None:  # else {"done"} of a rank that ended while this monitor was stopped
                    coordinator.receive(report, now)
                    verdict = coordinator.verdict
                    member.write({} if verdict is None else asdict(verdict))
        self._drop_closed()

    def _drop_closed(self) -> None:
        for member in self.members:
            if not member.open:
                member.channel.close()
        self.members = [member for member in self.members if member.open]

    def _exchange(self, member: Member, report: RankReport, now: float) -> None:
        """Sends a report to the coordinator and reads its answers."""
        if self.to_coordinator is None or not self.to_coordinator.open:
            with suppress(OSError):
                self.to_coordinator = JsonSocket(socket.create_connection(self.address, timeout=POLL_SECONDS))
                self.to_coordinator.write_line(self.token)
        if self.to_coordinator is not None:
            self.to_coordinator.write(asdict(report))
            for answer in self.to_coordinator.read():
                member.receive(answer, now)

    def _report_slow(self, coordinator: Coordinator) -> None:
        """Reports stragglers and slow saves."""
        reports = coordinator.reports
        for report, times in self.stragglers.update(reports):
            self._event("straggler", report.step, rank=report.rank, node=report.node, times=round(times, 2))
            self._print(
                f"rank {report.rank} on {report.node} is a straggler: its own work in a step takes "
                f"{times:.1f} times as long as that of the others"
            )
        slow = max(reports.values(), key=lambda report: report.saving, default=None)
        if slow is None or not slow.saving:
            self.reported_slow_save = False
        elif slow.saving > max(self.limits.floor, self.limits.checkpoint / 10) and not self.reported_slow_save:
            self.reported_slow_save = True
            self._event("checkpoint_slow", slow.step, rank=slow.rank, node=slow.node, seconds=round(slow.saving, 1))
            self._print(f"rank {slow.rank} on {slow.node} has been writing a checkpoint for {slow.saving:.0f} s")

    def _print(self, text: str) -> None:
        print(f"\nWATCHDOG: {text}", file=sys.stderr, flush=True)

    def _event(self, event: str, step: int, **fields: Any) -> None:
        """Adds a row to watchdog.jsonl; only the monitor that has created the file writes to it."""
        if self.directory is None:
            return
        row = {"time": round(time.time(), 3), "event": event, "step": step, **fields}
        with suppress(OSError), open(self.directory / "watchdog.jsonl", "a" if self.owns_events else "x") as file:
            self.owns_events = True
            file.write(json.dumps(row) + "\n")

    def _end_run(self, verdict: Verdict) -> None:
        """Sends the verdict to all monitors, writes the stacks, and ends the rank."""
        for member in self.members:
            member.write(asdict(verdict))
        incomplete = self._dump_stacks(verdict) if self.rank.ended is None else None
        if self.rank.number in (0, *verdict.ranks[:1]) or self.member is None:
            where = "" if self.directory is None else f"\n  stacks: {self.directory}/stacks_rank_*.txt"
            self._print(
                f"{verdict.reason}{where}\n  the run ends with exit code {ExitCode.HUNG}: the same command resumes it"
            )
        if self.member is None or 0 in verdict.ranks:
            self._event("failed", verdict.step, reason=f"watchdog: {verdict.reason}", ranks=list(verdict.ranks))
        self._await_stacks(verdict)
        if self.rank.ended is not None:
            return
        if self.rank.number in verdict.ranks and not self.rank.alone:
            time.sleep(CULPRIT_DELAY)  # the other ranks would see its end as a broken connection
        self.channel.write({"end": ExitCode.HUNG, "stacks": None if incomplete is None else str(incomplete)})
        with suppress(ProcessLookupError):
            os.kill(self.rank.pid, signal.SIGCONT)
        end = time.monotonic() + EXIT_TIMEOUT
        while time.monotonic() < end and self.rank.ended is None:
            time.sleep(0.05)
            self._read_rank()
        with suppress(ProcessLookupError):
            if self.rank.ended is None:
                os.kill(self.rank.pid, signal.SIGKILL)

    def _await_stacks(self, verdict: Verdict) -> None:
        """Returns when all monitors have written their rank's stacks: the end of one rank may end the others."""
        end, ready = time.monotonic() + STACK_TIMEOUT, False
        done: set[JsonSocket] = set()
        if self.to_coordinator is not None:
            self.to_coordinator.write({"done": True})
        while not ready and time.monotonic() < end:
            if self.entrance is not None:
                self.entrance.accept(time.monotonic())
                self.members += self.entrance.admitted(time.monotonic())
                for member in self.members:
                    for message in member.read():
                        if "done" in message:
                            done.add(member)
                        else:
                            member.write(asdict(verdict))
                self._drop_closed()
                ready = all(member in done for member in self.members)
            elif self.to_coordinator is not None:
                answers = self.to_coordinator.read()
                ready = any("go" in answer for answer in answers) or not self.to_coordinator.open
            else:
                ready = True
            time.sleep(0.05)
        for member in self.members:
            member.write({"go": True})

    def _dump_stacks(self, verdict: Verdict) -> Path | None:
        """Writes the rank's stacks with py-spy.

        Returns:
            None if that succeeded or there is no directory; else the file to which the rank itself shall add them.
        """
        if self.directory is None:
            return None
        path = self.directory / f"stacks_rank_{self.rank.number:04d}.txt"
        why = "py-spy is not installed"
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            file.write(f"{verdict.reason}\n\n")
            file.flush()
            if self.py_spy is not None:
                command = [self.py_spy, "dump", "--nonblocking", "--pid", str(self.rank.pid)]
                try:
                    dump = subprocess.run(
                        command, stdout=file, stderr=subprocess.PIPE, timeout=STACK_TIMEOUT, check=False
                    )
                    if dump.returncode == 0:
                        return None
                    why = dump.stderr.decode(errors="replace").strip()
                except (OSError, subprocess.TimeoutExpired) as error:
                    why = str(error)
            file.write(f"py-spy: {why}\n")
        return path

    def _release_members(self) -> None:
        """The rank has ended normally or reported its failure: the other monitors need no answers any more."""
        if self.to_coordinator is not None and self.member is not None:
            self._exchange(self.member, self.rank.report(time.monotonic()), time.monotonic())
        for member in self.members:
            member.write({"release": True})


def main() -> None:
    """Monitors the process that has started this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the rank
    Monitor(json.loads(sys.argv[1])).run()


if __name__ == "__main__":
    main()
