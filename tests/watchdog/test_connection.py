"""The coordinator's port: strangers, floods and malformed messages do nothing; the run's own monitors get through."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pytest

from rwkv_train.watchdog import connection
from rwkv_train.watchdog.connection import MAX_LINE_BYTES, MAX_TOKEN_BYTES, MAX_UNKNOWN, Entrance, JsonSocket, listen
from rwkv_train.watchdog.heartbeat import Heartbeat
from rwkv_train.watchdog.monitor import Monitor
from rwkv_train.watchdog.verdict import Limits, Member, Phase, RankReport, Verdict

Connect = Callable[..., socket.socket]

TOKEN = "0123456789abcdef0123456789abcdef"
DEEP = b"[" * 100_000 + b"\n"
REPORT = asdict(RankReport(1, "n1", step=7, ended="it broke"))
MALFORMED: list[dict[str, Any]] = [
    {"done": True},  # of a rank that ended while the coordinator was stopped
    {},
    {"rank": 2},
    {"rank": -1},
    {"rank": "1"},
    {"rank": [1]},
    {"rank": 1, "phase": 99},
    {"rank": 1, "step": "x"},
    {"rank": 1, "step": 10**400},
    {"rank": 1, "in_phase": float("nan")},
    {"rank": 1, "ended": 5},
    {"rank": 1, "node": None},
    {"rank": 1, "other": 1},
]


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with listen("127.0.0.1", one_node=True) as server:
        yield server


@pytest.fixture
def connect(server: socket.socket) -> Iterator[Connect]:
    """Connects to the server and sends something."""
    clients: list[socket.socket] = []

    def connect(*first: bytes) -> socket.socket:
        clients.append(socket.create_connection(server.getsockname()))
        for data in first:
            clients[-1].sendall(data)
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def coordinator(server: socket.socket) -> Iterator[Monitor]:
    """The monitor of rank 0 of two ranks, in this process."""
    beat, (ours, theirs) = Heartbeat(), socket.socketpair()
    settings = {
        "pid": os.getppid(),
        "alone": False,
        "memory": beat.fd,
        "channel": os.dup(theirs.fileno()),
        "listener": os.dup(server.fileno()),
        "limits": asdict(Limits()),
        "stragglers": [1.5, 50],
        "py_spy": None,
    }
    monitor = Monitor(settings)
    monitor._join(0, 2, "n0", "/nowhere", ["127.0.0.1", 0], TOKEN)
    yield monitor
    assert monitor.entrance is not None
    assert monitor.server is not None
    unknown = [one.channel for one in monitor.entrance._unknown]
    for channel in (
        ours,
        theirs,
        monitor.server,
        *unknown,
        *(one.channel for one in (*monitor.members, monitor.channel)),
    ):
        channel.close()
    monitor.selector.close()
    beat.close()


def looks(monitor: Monitor, until: Callable[[], bool]) -> bool:
    """Lets the monitor accept and look as its loop does."""
    assert monitor.entrance is not None
    for _ in range(400):
        monitor.entrance.accept(time.monotonic())
        assert monitor._look(time.monotonic()) is None
        if until():
            return True
        time.sleep(0.005)
    return False


def last_report(monitor: Monitor) -> RankReport:
    assert monitor.coordinator is not None
    return monitor.coordinator._last[1].report


def test_a_strangers_deep_json_does_nothing(connect: Connect, coordinator: Monitor) -> None:
    message = json.dumps({**REPORT, "token": "wrong"}).encode() + b"\n"
    strangers = [connect(data) for data in (DEEP, message, b"\n", b"\0" * 5000, TOKEN[:-1].encode() + b"\n")]
    member = connect(TOKEN.encode() + b"\n", json.dumps(REPORT).encode() + b"\n")
    assert looks(coordinator, lambda: last_report(coordinator).step == 7)
    assert len(coordinator.members) == 1
    for client in strangers:
        client.settimeout(5)
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""
    assert json.loads(member.recv(1 << 16)) == {}


def test_members_messages_that_are_no_reports_do_nothing(connect: Connect, coordinator: Monitor) -> None:
    """Most of all {"done"}, which a coordinator reads that was stopped while the other rank ended."""
    lines = [json.dumps(message).encode() + b"\n" for message in MALFORMED]
    connect(TOKEN.encode() + b"\n", *lines, DEEP, b"\xff\n", b"1\n", json.dumps(REPORT).encode() + b"\n")
    assert looks(coordinator, lambda: last_report(coordinator).step == 7)
    assert last_report(coordinator) == RankReport(**REPORT)


def test_what_strangers_can_occupy_is_bounded(server: socket.socket, connect: Connect) -> None:
    entrance = Entrance(server, TOKEN)
    idle = [connect() for _ in range(2 * MAX_UNKNOWN)]
    connect(TOKEN.encode() + b"\nfirst")
    connect(b"x" * (MAX_TOKEN_BYTES + 1))
    admitted: list[JsonSocket] = []
    for _ in range(len(idle) + 2):
        entrance.accept(0.0)
        admitted += entrance.admitted(0.0)
        assert len(entrance._unknown) <= MAX_UNKNOWN
        assert all(len(unknown._received) <= MAX_TOKEN_BYTES for unknown in entrance._unknown)
    assert [one._received for one in admitted] == [b"first"]
    assert list(entrance.admitted(connection.TOKEN_TIMEOUT + 1)) == []
    assert entrance._unknown == []
    for one in admitted:
        one.channel.close()


def test_a_line_without_an_end_is_not_kept() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = JsonSocket(ours)
        theirs.setblocking(False)
        sent = 0
        while reader.open and sent < 64 * MAX_LINE_BYTES:
            try:
                sent += theirs.send(b"x" * 65536)
            except BlockingIOError:
                assert list(reader.read()) == []
            assert len(reader._received) <= MAX_LINE_BYTES
        assert not reader.open


def test_a_member_takes_only_whole_verdicts() -> None:
    member = Member(1, 0.0)
    for answer in (
        {},
        {"reason": "x"},
        {"reason": "x", "ranks": 1, "step": 1},
        {"reason": "x", "ranks": ["a"], "step": 1},
    ):
        member.receive(answer, 1.0)
    assert member.verdict is None
    member.receive(asdict(Verdict([1], 3, "it hangs")), 2.0)
    assert member.verdict == Verdict([1], 3, "it hangs")


@pytest.mark.parametrize("phase", list(Phase))
def test_every_report_of_ours_is_valid(phase: Phase) -> None:
    report = RankReport(3, "n", 5, 2, 1, phase, 1.5, 60.0, 0.0, 0.1, "D", 2.0, 0.3, "" if phase == Phase.END else None)
    assert RankReport.parse(json.loads(json.dumps(asdict(report))), 4) == report


@pytest.mark.parametrize(
    ("found", "one_node", "bound"),
    [
        (["127.0.0.1"], True, "127.0.0.1"),
        (["127.0.0.1"], False, "0.0.0.0"),  # a host name that /etc/hosts gives to the loopback: others cannot reach it
        (["192.0.2.1"], False, "0.0.0.0"),  # of a gateway
        (["127.0.0.1", "127.0.0.2"], True, "0.0.0.0"),
        ([], True, "0.0.0.0"),
    ],
)
def test_the_interface(found: list[str], one_node: bool, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, *_: Any) -> list[Any]:
        if not found:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with listen("head", one_node) as server:
        assert server.getsockname()[0] == bound
