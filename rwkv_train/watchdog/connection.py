"""Connections of a monitor: to its rank, and between the monitors, over a port to which any program may connect.

A connection to the coordinator begins with a line that holds the run's token, which the ranks exchange by a collective.
Whatever else comes first, or takes too long, closes that connection and has no other effect.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

BACKLOG = 4096  # connections that the kernel holds until they are accepted
MAX_TOKEN_BYTES = 1 << 10  # of the first line
MAX_LINE_BYTES = 1 << 18  # of a message; a verdict may name 40,000 ranks
MAX_READ_BYTES = 1 << 20  # that one call reads from a connection: nobody keeps the monitor from its other work
MAX_UNKNOWN = 64  # connections without the token at a time; a further one closes the oldest
TOKEN_TIMEOUT = 5.0  # seconds that a connection has for the token


class JsonSocket:
    """A socket that carries one JSON object per line in both directions and never blocks.

    Args:
        channel: the connected socket.
        received: bytes that were read from it already.

    Attributes:
        open: False once nothing more can come.
    """

    def __init__(self, channel: socket.socket, received: bytes = b"") -> None:
        channel.setblocking(False)
        self.channel, self.open = channel, True
        self._received, self._unsent = received, b""

    def read(self) -> Iterator[dict[str, Any]]:
        """The messages that have come; a line that is no JSON object is left out, one that is too long ends them."""
        for _ in range(0, MAX_READ_BYTES, MAX_LINE_BYTES):
            data = self._receive()
            *lines, self._received = (self._received + data).split(b"\n")
            if len(self._received) > MAX_LINE_BYTES:
                self.open, self._received = False, b""
            for line in lines:
                with suppress(ValueError, RecursionError):
                    if isinstance(message := json.loads(line), dict):
                        yield message
            if not data or not self.open:
                break

    def _receive(self) -> bytes:
        try:
            data = self.channel.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        self.open = bool(data)
        return data

    def write(self, message: dict[str, Any]) -> None:
        """Sends what fits now; the rest is sent with the next message."""
        self.write_line(json.dumps(message))

    def write_line(self, line: str) -> None:
        """As `write`: the token, before all messages."""
        self._unsent += line.encode() + b"\n"
        try:
            self._unsent = self._unsent[self.channel.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.open = False


class Entrance:
    """Accepts connections, and hands out those that begin with the token.

    Args:
        server: listens.
        token: of the run.
    """

    def __init__(self, server: socket.socket, token: str) -> None:
        server.setblocking(False)
        self.server = server
        self._token = token.encode()
        self._unknown: list[_Unknown] = []

    def accept(self, now: float) -> None:
        """Accepts a connection, if one waits.

        Args:
            now: seconds by any monotonic clock; the same clock in all calls.
        """
        with suppress(OSError):
            self._unknown.append(_Unknown(self.server.accept()[0], now + TOKEN_TIMEOUT))
        if len(self._unknown) > MAX_UNKNOWN:
            self._unknown.pop(0).channel.close()

    def admitted(self, now: float) -> Iterator[JsonSocket]:
        """The connections that have sent the token since the last call."""
        waiting, self._unknown = self._unknown, []
        for unknown in waiting:
            line, found, rest = unknown.read().partition(b"\n")
            if found and hmac.compare_digest(line, self._token):
                yield JsonSocket(unknown.channel, rest)
            elif found or unknown.over or now > unknown.deadline:
                unknown.channel.close()
            else:
                self._unknown.append(unknown)


class _Unknown:
    """A connection that has not sent the token yet.

    Args:
        channel: its socket.
        deadline: when it is closed.

    Attributes:
        over: whether no token can come any more.
    """

    def __init__(self, channel: socket.socket, deadline: float) -> None:
        channel.setblocking(False)
        self.channel, self.deadline, self.over = channel, deadline, False
        self._received = b""

    def read(self) -> bytes:
        """What has come so far, at most MAX_TOKEN_BYTES."""
        try:
            data = self.channel.recv(MAX_TOKEN_BYTES - len(self._received))
            self._received += data
            self.over = not data or len(self._received) == MAX_TOKEN_BYTES
        except BlockingIOError:
            pass
        except OSError:
            self.over = True
        return self._received


def listen(host: str, one_node: bool) -> socket.socket:
    """A listening socket on the interface that the other ranks reach this machine by.

    Args:
        host: MASTER_ADDR, by which they do.
        one_node: whether all ranks are on this machine.

    Returns:
        a socket on the only address that `host` has; on all interfaces where it has several, where it is no address of
        this machine (that of a gateway), or where it is one of the loopback (a host name in /etc/hosts) and there are
        ranks elsewhere.
    """
    with suppress(OSError, ValueError):
        found = {info[4][0] for info in socket.getaddrinfo(host, 0, socket.AF_INET, socket.SOCK_STREAM)}
        (address,) = map(str, found)
        if one_node or not ipaddress.ip_address(address).is_loopback:
            return socket.create_server((address, 0), backlog=BACKLOG)
    return socket.create_server(("", 0), backlog=BACKLOG)
