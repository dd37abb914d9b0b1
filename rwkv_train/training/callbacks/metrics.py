"""metrics.jsonl: one object per optimiser step, from which every other record is made."""

from __future__ import annotations

import math
import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from rwkv_train.data.batches import Batches
from rwkv_train.data.bits_per_byte import bits_per_byte
from rwkv_train.rundir.attempts import Attempts
from rwkv_train.rundir.jsonl import JsonLines, MetricsRow
from rwkv_train.rundir.row_ranges import last_row_in
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.throughput import AsyncHostCopy, Stopwatch, matmul_rate, utilisation

PARTS = ("data", "forward", "backward", "optimizer")
MAX_REWIND_STEPS = 10_000  # whose hours are known when a rewind takes them back
_TEXT = ("predicted tokens", "bytes of their text")  # of a step, for `train/bits_per_byte`
_STOPS = "ranks that ask to stop"
CLIP_WINDOW = 100  # steps over which `clip_share` is taken


@dataclass(frozen=True)
class Spent:
    """Hours that the run has used before this process.

    Attributes:
        hours: time for which the processes of all attempts have run.
        productive: the part of it in steps that are still part of the run.
    """

    hours: float = 0.0
    productive: float = 0.0

    @classmethod
    def of(cls, attempts: Attempts, lines: JsonLines) -> Spent:
        """Reads the last row of each attempt, and the last row of the run."""
        files = [attempts.directory(number) / "metrics.jsonl" for number in attempts.numbers()]
        hours = max(((last_row_in(file) or {}).get("hours", 0.0) for file in files), default=0.0)
        kept = lines.last_row() or {}
        return cls(hours, kept["hours"] * kept["goodput"] if "hours" in kept else 0.0)


@dataclass
class _Pending:
    """The row of a step whose values are still being copied to the host."""

    row: dict[str, Any]
    flight: AsyncHostCopy
    marks: list[tuple[str, Any]]
    paused: float


class Metrics(Callback):
    """Writes a row for each step once its validation is done and its values are on the host: docs/metrics.md.

    On a CPU a row is written when the next step begins; on a GPU one step later, so that the host never waits for the
    device. All ranks write the row of the same step at the same time.

    Args:
        lines: file of the rows.
        data: the batches of the run.
        clip: the norm to which gradients are clipped; None: they are not clipped.
        paused: returns the seconds for which checkpoints have paused training so far.
        spent: hours that the run has used before this process.

    Attributes:
        latest: the last row that was written.
        listeners: called with each row.
        stop_asked: whether any rank had asked all of them to stop in a step whose row is written.
        rate: measured matmul rate of this device, in FLOPs per second.
    """

    def __init__(
        self,
        lines: JsonLines,
        data: Batches,
        clip: float | None = None,
        paused: Callable[[], float] = lambda: 0.0,
        spent: Spent | None = None,
    ) -> None:
        self.lines, self.data, self.clip, self.paused = lines, data, clip, paused
        spent = spent or Spent()
        self._hours, self._productive = spent.hours, spent.productive
        self.latest: MetricsRow = {}
        self.listeners: list[Callable[[MetricsRow], None]] = []
        self.stop_asked = False
        self.rate = math.inf
        self._pending: deque[_Pending] = deque()
        self._clipped: deque[bool] = deque(maxlen=CLIP_WINDOW)
        self._spent: deque[tuple[int, float]] = deque(maxlen=MAX_REWIND_STEPS)  # (step, hours) of the last steps
        self._born = time.time()
        self._began = time.perf_counter()
        self._paused = 0.0
        self._in_flight = 0  # last steps whose values may not be on the host yet
        self._watch = Stopwatch(torch.device("cpu"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rate = matmul_rate(pl_module.device, str(trainer.precision), torch.get_num_threads())
        self._watch, self._in_flight = Stopwatch(pl_module.device), int(pl_module.device.type == "cuda")
        self._began = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._watch.mark("data")
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.write(self._in_flight)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        self._watch.mark("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watch.mark("backward")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, RWKVModule)
        self._watch.mark("optimizer")
        now = time.perf_counter()  # the same instant: statistics count for the next step, in `seconds` and in its parts
        statistics, verdict = pl_module.statistics, pl_module.verdict
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert verdict.loss is not None
        assert verdict.skipped is not None
        assert verdict.text is not None
        assert verdict.stops is not None
        strategy = pl_module.strategy
        values = {"train/loss": verdict.loss, "grad_norm": pl_module.grad_norm, "skipped": verdict.skipped}
        values[_STOPS] = verdict.stops
        values |= dict(zip(_TEXT, verdict.text, strict=True))
        values = {key: value.to(strategy.root_device) for key, value in values.items()}
        if statistics.due:
            values |= statistics.layer_values(strategy)
        step = trainer.global_step
        row: dict[str, Any] = {"step": step, "tokens": pl_module.tokens_seen, "lr": pl_module.lr}
        row |= {"seconds": round(now - self._began, 6), "time": round(time.time(), 3), "memory": _memory(strategy)}
        if len(statistics.sources) > 1:
            by_source = self.data.tokens_by_source(step)
            row.update({f"tokens/{name}": tokens for name, tokens in by_source.items()})
        row["mfu"] = utilisation(
            pl_module.model.flops_per_token(self.data.context),
            pl_module.tokens_per_step / row["seconds"],
            self.rate,
            trainer.world_size,
        )
        row["tokens_per_second"] = pl_module.tokens_per_step / row["seconds"]
        paused, self._paused = self.paused() - self._paused, self.paused()
        self._pending.append(_Pending(row, AsyncHostCopy(values), self._watch.lap(), paused))
        self._began = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RWKVModule)
        found = pl_module.validated
        if not self._pending or found is None:
            return
        row = self._pending[-1].row
        row["val/loss"] = found.loss
        row["val/bits_per_byte"] = found.bits_per_byte
        row["val/perplexity"] = math.exp(min(found.loss, 700.0))
        row.update({f"val/loss/{source}": loss for source, loss in found.by_source.items()})
        self._watch.mark("")
        self._began = time.perf_counter()  # the next step's time does not count the validation

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        self.write()  # a run that resumes from this checkpoint has all rows up to it

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write()

    def write(self, in_flight: int = 0) -> None:
        """Writes the rows of all steps but the last `in_flight` ones."""
        while len(self._pending) > in_flight:
            row = self._complete(self._pending.popleft())
            self.latest = row
            self.lines.append(row)
            for listener in self.listeners:
                listener(row)

    def forget(self, step: int) -> None:
        """Removes the time of the steps after `step` from the productive time: the run was rewound."""
        while self._spent and self._spent[-1][0] > step:
            self._productive -= self._spent.pop()[1]
        self._began = time.perf_counter()
        self._watch.mark("")
        self._watch.lap()

    def _complete(self, pending: _Pending) -> MetricsRow:
        values = pending.flight.values()
        spent, loss, norm = self._watch.seconds(pending.marks), values["train/loss"], values["grad_norm"]
        tokens, text_bytes = (values.pop(key) for key in _TEXT)
        self.stop_asked |= values.pop(_STOPS) > 0
        spent["forward"] = max(0.0, spent.get("forward", 0.0) - pending.paused)  # a checkpoint pauses at its start
        self._clipped.append(self.clip is not None and norm > self.clip)
        self._spent.append((pending.row["step"], pending.row["seconds"] / 3600))
        self._productive += self._spent[-1][1]
        hours = self._hours + (pending.row["time"] - self._born) / 3600
        row = {
            "step": pending.row["step"],
            "tokens": pending.row["tokens"],
            "train/loss": loss,
            "train/bits_per_byte": bits_per_byte(loss * tokens, text_bytes),
            **pending.row,
            "grad_norm": norm,
            "grad_norm_clipped": norm * min(1.0, (self.clip or math.inf) / (norm + 1e-6)),
            "clip_share": sum(self._clipped) / len(self._clipped),
            "skipped": int(values["skipped"]),
            **{f"time/{part}": round(spent.get(part, 0.0), 6) for part in PARTS},
            "time/checkpoint": round(pending.paused, 6),
            "hours": round(hours, 7),
            "goodput": round(min(1.0, self._productive / hours), 6) if hours else 1.0,
        }
        further = {key: value for key, value in values.items() if key not in row}
        row.update({key: _rounded(value) for key, value in further.items() if value == value})
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }


def _rounded(value: Any) -> Any:
    """Five significant digits of each number; null for what is not finite."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _memory(strategy: Any) -> int:
    if strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated(strategy.root_device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
