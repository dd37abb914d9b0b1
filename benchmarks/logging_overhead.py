"""The cost of logging and monitoring a run: `python benchmarks/logging_overhead.py [--quick]`.

A run of L6 C512 (B 4, T 128) through train.py with its callbacks, records and a W&B tracker (offline, a process of its
own). Timed is every call into our own observers: callbacks, statistics, listeners in the blocks, the copy of the values
to the host. Medians over 200 steps: of a logged step, and of one with the values of each layer (here every tenth is).
`overhead` is their share of the run at one such step in a hundred, over the steps' median.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

from rwkv_train.cli import launcher
from rwkv_train.training import statistics
from rwkv_train.training.callbacks.bad_steps import BadSteps
from rwkv_train.training.callbacks.metrics import Metrics
from rwkv_train.training.callbacks.progress import ProgressBar
from rwkv_train.training.step_verdict import StepVerdict

PERIOD = 10  # steps between two with the values of each layer
METHODS = (
    "begin_step",
    "record_microbatch",
    "record_logits",
    "record_hidden",
    "judge",
    "after_step",
    "layer_values",
)
HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end")


class Clock:
    """Seconds inside the observers, by step; what one calls of another is counted once."""

    def __init__(self) -> None:
        self.spent: list[float] = [0.0]
        self._depth = 0

    def around(self, run: Callable[..., Any], ends_step: bool = False) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if ends_step and self._depth == 0:
                self.spent.append(0.0)
            self._depth += 1
            began = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.spent[-1] += time.perf_counter() - began

        return timed

    def watch(self) -> None:
        """Puts itself around everything that observes."""
        for kind in (Metrics, BadSteps, ProgressBar):
            for hook in HOOKS:
                if hook in vars(kind):
                    first = kind is Metrics and hook == "on_train_batch_start"
                    setattr(kind, hook, self.around(vars(kind)[hook], first))
        for kind in (statistics.Statistics, StepVerdict):
            for name in METHODS:
                if name in vars(kind):
                    setattr(kind, name, self.around(vars(kind)[name]))
        for name in ("_output", "_contribution"):
            make = vars(statistics.Statistics)[name]
            setattr(statistics.Statistics, name, lambda *args, _make=make: self.around(_make(*args)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps instead of 200, under 50 s")
    steps = 60 if parser.parse_args().quick else 200
    clock = Clock()
    clock.watch()
    with tempfile.TemporaryDirectory() as root:
        overrides = [
            "model.n_layer=6",
            "model.n_embd=512",
            "batch.context=128",
            "batch.tokens=512",
            f"budget.steps={steps}",
        ]
        overrides += [f"run.root={root}", "run.name=bench", "samples.tokens=0", "data.hold_out=0", "trainer.devices=1"]
        overrides += [
            "trainer.accelerator=cpu",
            "checkpoint.every.steps=1000000",
            f"statistics.every.steps={PERIOD}",
        ]
        overrides += ["logger=wandb", "logger.wandb.mode=offline"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert launcher.main(overrides) == 0, printed.getvalue()
        rows = [json.loads(line) for line in (Path(root) / "bench" / "metrics.jsonl").read_text().splitlines()]
    spent = dict(enumerate(clock.spent))  # what is spent between two beginnings of a step: step 1 is number 1
    full = [spent[row["step"]] for row in rows[5:-1] if row["step"] % PERIOD == 0]
    logged = [
        spent[row["step"]] for row in rows[5:-1] if row["step"] % PERIOD > 1
    ]  # not the one that writes a full row
    step = measure.median([row["seconds"] for row in rows[5:] if row["step"] % PERIOD])
    figures = {
        "ms_logged_step": 1e3 * measure.median(logged),
        "ms_full_step": 1e3 * measure.median(full),
        "overhead": (0.99 * measure.median(logged) + 0.01 * measure.median(full)) / step,
        "ms_step": 1e3 * step,
    }
    header = ["ms a logged step", "ms with all layers", "ms a step", "share of the run"]
    cells = [f"{figures[name]:.3f}" for name in ("ms_logged_step", "ms_full_step", "ms_step")]
    print(measure.table(header, [[*cells, f"{figures['overhead']:.2%}"]]))
    print(json.dumps({name: round(value, 5) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
