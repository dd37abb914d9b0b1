"""`report --live`: the page on localhost, following runs that are still running."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rwkv_train.errors import UserError
from rwkv_train.evaluation.report.page import as_json, payload, render
from rwkv_train.evaluation.report.run import Run


class Server(ThreadingHTTPServer):
    """Serves `/`, the page, and `/data.json`, which is made anew when a run has written something.

    Args:
        runs: to follow.
        port: on this machine; 0: any free one.

    Raises:
        UserError: the port is not free.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[Run], port: int) -> None:
        self.runs, self._lock = runs, threading.Lock()
        self._data, self._tag = "", ""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"--port {port} cannot be used: {why}", "give another one, or 0 for any free one") from None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def data(self) -> tuple[str, str]:
        """The data as JSON, and a tag that changes with them."""
        with self._lock:
            changed = [run.refresh() for run in self.runs]  # each of them
            if any(changed) or not self._data:
                self._data = as_json(payload(self.runs))
                self._tag = f'"{hashlib.sha256(self._data.encode()).hexdigest()[:16]}"'
            return self._data, self._tag

    def page(self) -> str:
        with self._lock:
            for run in self.runs:
                run.refresh()
            return render(payload(self.runs), live=True)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.headers.get("Host", "").split(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(403)  # another name that leads here: a page elsewhere may not read the run
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
        """Says nothing: the terminal is for the address."""
