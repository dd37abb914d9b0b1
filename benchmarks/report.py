"""The cost of a report: the time to make it, its size, and the time to open it in Chromium.

    python benchmarks/report.py [--quick]

make_s   from the command to the file: 10 runs of 100,000 steps with every metric of docs/metrics.md (--quick: 10,000),
         in a process of its own, the fastest of three
mb       of the file
open_s   from asking for the file until the last chart of the first screen is drawn, the fastest of three, in headless
         Chromium without a cache
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import seconds, table
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.evaluation.made_runs import make_run  # noqa: E402

RUNS, STEPS = 10, 100_000
CHARTS_DRAWN = "() => document.querySelectorAll('canvas').length >= 2 && performance.now()"


def opening(page: Path) -> float:
    """Seconds until a fresh browser shows curves."""
    path = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(page.as_uri(), wait_until="commit")
        shown = float(tab.wait_for_function(CHARTS_DRAWN).json_value())
        browser.close()
    return shown / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, one round")
    quick = parser.parse_args().quick
    steps, rounds = (STEPS // 10, 1) if quick else (STEPS, 3)
    with tempfile.TemporaryDirectory() as folder:
        runs = [make_run(Path(folder) / f"run_{number}", steps, number) for number in range(RUNS)]
        logged = sum((run / "metrics.jsonl").stat().st_size for run in runs)
        out = Path(folder) / "report.html"
        command = [sys.executable, "-m", "rwkv_train.cli.main", "report", *map(str, runs), "--out", str(out)]
        made = min(seconds(lambda: subprocess.run(command, check=True, cwd=ROOT)) for _ in range(rounds))
        opened = min(opening(out) for _ in range(rounds))
        size = out.stat().st_size / 1e6
    figures = {"runs": RUNS, "steps": steps, "logged_mb": logged / 1e6, "make_s": made, "mb": size, "open_s": opened}
    rounded = {name: round(value, 2) for name, value in figures.items()}
    print(table(list(rounded), [[f"{value:,}" for value in rounded.values()]]))
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
