"""`rwkv-train report RUN_DIR [RUN_DIR …]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_train.console import for_stream
from rwkv_train.errors import UserError
from rwkv_train.evaluation.report.page import payload, render
from rwkv_train.evaluation.report.recorded_run import open_runs
from rwkv_train.user_path import user_path


@dataclass(frozen=True)
class ReportOptions:
    """The options of `rwkv-train report`.

    Attributes:
        runs: run directories.
        out: the HTML file; None: report.html, for a single run in its directory.
        png: directory for the charts as PNG files; None: none are drawn.
        live: whether to serve the page and follow the runs instead of writing a file.
        port: port of the server; 0: any free one.
    """

    runs: Sequence[str]
    out: str | None = None
    png: str | None = None
    live: bool = False
    port: int = 6008


def run(options: ReportOptions) -> int:
    """Writes the report of runs, or serves it until Ctrl-C.

    Returns:
        The exit code, 0.

    Raises:
        UserError: a directory contains no run, a file cannot be written, or the port is in use.
    """
    runs = open_runs([user_path(name) for name in options.runs], wait=options.live)
    if options.live:
        from rwkv_train.evaluation.report.live_server import ReportServer

        with ReportServer(runs, options.port) as server:
            names = for_stream(", ".join(run.name for run in runs), sys.stdout)
            print(f"{names}: {server.address} (stop with Ctrl-C)", flush=True)
            server.serve_forever(poll_interval=0.2)
        return 0
    out = user_path(options.out) if options.out else (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    data = payload(runs)
    try:
        temporary = out.with_name(f".{out.name}")
        temporary.write_text(render(data), encoding="utf-8")
        temporary.replace(out)
        print(f"wrote {for_stream(str(out), sys.stdout)} ({out.stat().st_size / 1e6:.1f} MB)")
        if options.png is not None:
            from rwkv_train.evaluation.report.figures import draw_charts

            for path in draw_charts(data, user_path(options.png)):
                print(f"wrote {path}")
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written: {error.strerror}", "give another path with --out or --png"
        ) from None
    for recorded in runs:
        for note in recorded.notes:
            print(for_stream(f"note: {recorded.name}: {note}", sys.stdout))
    return 0
