"""`rwkv-train report RUN_DIR [RUN_DIR …]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_train.errors import UserError
from rwkv_train.evaluation.report.page import payload, render
from rwkv_train.evaluation.report.run import open_runs


@dataclass(frozen=True)
class Wanted:
    """What is asked of `report`.

    Args:
        runs: directories.
        out: the HTML file; None: RUN/report.html of a single run, report.html here of several.
        png: a directory for pictures of the charts; None: none are drawn.
        live: whether the page is served and follows the runs, instead.
        port: of the server; 0: any free one.
    """

    runs: Sequence[str]
    out: str | None = None
    png: str | None = None
    live: bool = False
    port: int = 6008


def run(wanted: Wanted) -> int:
    """The command.

    Raises:
        UserError: a directory holds no run, or the file cannot be written.
    """
    runs = open_runs([Path(name).expanduser() for name in wanted.runs], wait=wanted.live)
    if wanted.live:
        from rwkv_train.evaluation.report.live import Server

        with Server(runs, wanted.port) as server:
            print(f"{', '.join(run.name for run in runs)}: {server.address} (Ctrl-C ends it)", flush=True)
            server.serve_forever(poll_interval=0.2)
        return 0
    out = Path(wanted.out).expanduser() if wanted.out else (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    data = payload(runs)
    try:
        aside = out.with_name(f".{out.name}")
        aside.write_text(render(data), encoding="utf-8")
        aside.replace(out)
        print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
        if wanted.png is not None:
            from rwkv_train.evaluation.report.figures import draw

            for path in draw(data, Path(wanted.png).expanduser()):
                print(f"wrote {path}")
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written: {error.strerror}", "--out FILE gives another place"
        ) from None
    for found in runs:
        for note in found.notes:
            print(f"note: {found.name}: {note}")
    return 0
