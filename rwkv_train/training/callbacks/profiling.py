"""`profile=true`: ten steps under torch.profiler, a trace for ui.perfetto.dev, and a table of the costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Column, Table
from torch.profiler import ProfilerActivity, profile, schedule

WAIT_STEPS, WARMUP_STEPS, RECORDED_STEPS = 5, 2, 10  # not profiled; profiled but discarded; recorded
TABLE_ROWS = 10


class Profiling(Callback):
    """Records ten steps on rank 0, after the first ones.

    Args:
        folder: directory of the run; the trace is written to `trace.json` there.
        console: where the table is printed.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.path, self.console = folder / "trace.json", console
        self._profiler: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        cuda = pl_module.device.type == "cuda"
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])],
            schedule=schedule(wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=RECORDED_STEPS, repeat=1),
            on_trace_ready=self._report,
            record_shapes=True,
        )
        self._profiler.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._profiler.step()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler = None

    def _report(self, recorded: Any) -> None:
        recorded.export_chrome_trace(str(self.path))
        cuda = torch.cuda.is_available()
        costs = costs_of(recorded.key_averages(), cuda)
        total = sum(seconds for _, seconds, _ in costs)
        table = Table(
            Column("operator", no_wrap=True, overflow="ellipsis", max_width=40),
            "ms a step",
            "share",
            "calls a step",
            title=f"where {RECORDED_STEPS} steps went",
            title_justify="left",
        )
        for name, seconds, calls in costs[:TABLE_ROWS]:
            table.add_row(
                name, f"{1000 * seconds / RECORDED_STEPS:.2f}", f"{seconds / total:.1%}", f"{calls / RECORDED_STEPS:g}"
            )
        self.console.print(table)
        for advice in advice_on(costs, total):
            self.console.print(f"  {advice}")
        self.console.print(f"  trace: {self.path}, to be opened in https://ui.perfetto.dev", soft_wrap=True)


def costs_of(averages: Any, cuda: bool) -> list[tuple[str, float, int]]:
    """(operator, own seconds, calls), the most expensive first.

    Args:
        averages: of a profiler.
        cuda: whether time on the device counts instead of time on the CPU.
    """
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [(each.key, getattr(each, kind) / 1e6, each.count) for each in averages]
    return sorted(
        (cost for cost in found if cost[1] > 0 and not cost[0].startswith("ProfilerStep")), key=lambda c: -c[1]
    )


def advice_on(costs: list[tuple[str, float, int]], total: float) -> list[str]:
    """Advice on two known causes: pageable copies and reading device values in each step."""
    share = {name: seconds / total for name, seconds, _ in costs}
    advice = []
    copies = share.get("Memcpy HtoD (Pageable -> Device)", 0.0)
    if copies > 0.05:
        advice.append(
            f"{copies:.0%} of the time goes into copies from pageable memory: a callback moves tensors itself; pin them"
        )
    waits = sum(seconds for name, seconds in share.items() if name in ("aten::_local_scalar_dense", "aten::item"))
    if waits > 0.05:
        advice.append(
            f"{waits:.0%} of the time goes into .item(): a callback reads a value from the device in every step"
        )
    return advice
