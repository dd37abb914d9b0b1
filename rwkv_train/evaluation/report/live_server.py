"""`report --live`: an HTTP server on localhost whose page follows running runs."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rwkv_train.errors import UserError
from rwkv_train.evaluation.report.page import as_json, payload, render
from rwkv_train.evaluation.report.recorded_run import RecordedRun


class ReportServer(ThreadingHTTPServer):
    """Serves the page at `/` and its data at `/data.json`, which is rebuilt after a run has written something.

    Args:
        runs: the runs to follow.
        port: port on 127.0.0.1; 0: any free one.

    Raises:
        UserError: the port is invalid or in use.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[RecordedRun], port: int) -> None:
        self.runs, self._lock = runs, threading.Lock()
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
        return f"http://127.0.0.1:{self.server_port}/"

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

    def do_GET(self) -> None:
        if self.headers.get("Host", "").split(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(403)  # DNS rebinding: pages of other hosts must not read the runs
        elif self.path == "/":
            self._send("text/html", self.server.page())
        elif self.path == "/data.json":
            data, tag = self.server.data()
            if self.headers.get("If-None-Match") == tag:
                self.send_response(304)
                self.end_headers()
            else:
                self._send("application/json", data, tag)
        elif self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
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
