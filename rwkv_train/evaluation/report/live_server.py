"""`report --live`: an HTTP server on localhost whose page follows running runs."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rwkv_train.errors import UserError
from rwkv_train.evaluation.report.page import as_json, payload, render
from rwkv_train.evaluation.report.recorded_run import RecordedRun

IDLE_SECONDS = 30.0  # in which a connection must send its request, and takes each part of the answer
MAX_CONNECTIONS = 32  # at once; a page needs one


class ReportServer(ThreadingHTTPServer):
    """Serves the page and `data.json`, which is rebuilt after a run has written something, below a secret path.

    Other users of the machine reach the port, too: only who has the address that was printed may read the runs.
    Connections that say nothing are closed, and more than MAX_CONNECTIONS at once are refused.

    Args:
        runs: the runs to follow.
        port: port on 127.0.0.1; 0: any free one.

    Raises:
        UserError: the port is invalid or in use.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[RecordedRun], port: int) -> None:
        self.runs, self._lock = runs, threading.Lock()
        self.root = f"/{secrets.token_urlsafe(16)}/"
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._data, self._tag = "", ""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"--port {port} cannot be used: {reason}", "give another port, or 0 for any free one"
            ) from None

    @property
    def address(self) -> str:
        """The URL of the page."""
        return f"http://127.0.0.1:{self.server_port}{self.root}"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing where a client has gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def data(self) -> tuple[str, str]:
        """The data as JSON, and an ETag that changes with it."""
        with self._lock:
            changed = [run.refresh() for run in self.runs]  # a list, so that every run is refreshed
            if any(changed) or not self._data:
                self._data = as_json(payload(self.runs))
                self._tag = f'"{hashlib.sha256(self._data.encode()).hexdigest()[:16]}"'
            return self._data, self._tag

    def page(self) -> str:
        """The HTML page with the current data."""
        with self._lock:
            for run in self.runs:
                run.refresh()
            return render(payload(self.runs), live=True)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        if self.headers.get("Host", "").split(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(403)  # DNS rebinding: pages of other hosts must not read the runs
        elif self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        elif not hmac.compare_digest(self.path[: len(self.server.root)].encode(), self.server.root.encode()):
            self.send_error(404)
        elif self.path == self.server.root:
            self._send("text/html", self.server.page())
        elif self.path == f"{self.server.root}data.json":
            data, tag = self.server.data()
            if self.headers.get("If-None-Match") == tag:
                self.send_response(304)
                self.end_headers()
            else:
                self._send("application/json", data, tag)
        else:
            self.send_error(404)

    def _send(self, kind: str, content: str, tag: str | None = None) -> None:
        body = content.encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-cache")
        if tag is not None:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing, so that the address stays visible in the terminal."""
