"""metrics.jsonl: one object per optimiser step, the truth that every other record is made from."""

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

from rwkv_train.rundir.attempts import Attempts
from rwkv_train.rundir.jsonl import JsonLines
from rwkv_train.training.host_copy import AsyncHostCopy
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.throughput import Stopwatch, matmul_rate, utilisation

Row = dict[str, Any]
PARTS = ("data", "forward", "backward", "optimizer")
KEPT = 10_000  # steps that a rewind may take back
CLIPPED_OF = 100  # steps whose clipped ones `clip_share` counts


@dataclass(frozen=True)
class Spent:
    """What the run's processes before this one have used up, in hours, and how much of it is still worth something."""

    hours: float = 0.0
    productive: float = 0.0

    @classmethod
    def of(cls, attempts: Attempts, lines: JsonLines) -> Spent:
        """From the last row of each attempt, and from the last one that still counts."""
        files = [attempts.directory(number) / "metrics.jsonl" for number in attempts.numbers()]
        ends = [row for file in files for row in JsonLines(file).rows()[-1:]]
        kept = [row for row in lines.rows()[-1:] if "hours" in row]
        hours = max((row.get("hours", 0.0) for row in ends), default=0.0)
        return cls(hours, sum(row["hours"] * row["goodput"] for row in kept))


@dataclass
class _Pending:
    """A step's row before its values are on the host."""

    row: Row
    flight: AsyncHostCopy
    marks: list[tuple[str, Any]]
    paused: float


class Metrics(Callback):
    """Writes a row for each step when its validation is done and its values are on the host: docs/metrics.md.

    On a CPU that is when the next step begins. On a GPU it is one step later: the host runs ahead of it, and waits for
    nothing. Either way it is the same step on all ranks.

    Args:
        lines: where the rows go.
        bytes_per_token: of the held-out text, for bits per byte.
        clip: the norm to which gradients are clipped; None: they are not.
        paused: seconds for which checkpoints have stopped the training so far.
        spent: of the run before this process.
    """

    def __init__(
        self,
        lines: JsonLines,
        bytes_per_token: float,
        clip: float | None = None,
        paused: Callable[[], float] = lambda: 0.0,
        spent: Spent | None = None,
    ) -> None:
        self.lines, self.bytes_per_token, self.clip, self.paused = lines, bytes_per_token, clip, paused
        spent = spent or Spent()
        self._hours, self._productive = spent.hours, spent.productive
        self.latest: Row = {}  # the last row that was written
        self.listeners: list[Callable[[Row], None]] = []  # called with each row
        self.rate = math.inf  # of matrix products on this device
        self._pending: deque[_Pending] = deque()
        self._clipped: deque[bool] = deque(maxlen=CLIPPED_OF)
        self._spent: deque[tuple[int, float]] = deque(maxlen=KEPT)  # hours of the last steps
        self._born = time.time()
        self._began = time.perf_counter()
        self._paused = 0.0
        self._behind = 0  # steps whose values may still be on their way
        self._watch = Stopwatch(torch.device("cpu"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rate = matmul_rate(pl_module.device, str(trainer.precision))
        self._watch, self._behind = Stopwatch(pl_module.device), int(pl_module.device.type == "cuda")
        self._began = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._watch.mark("data")
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.write(self._behind)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        self._watch.mark("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watch.mark("backward")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, RWKVModule)
        self._watch.mark("optimizer")
        statistics, verdict = pl_module.statistics, pl_module.verdict
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert verdict.loss is not None
        assert verdict.skipped is not None
        strategy = pl_module.strategy
        values = {"train/loss": verdict.loss, "grad_norm": pl_module.grad_norm, "skipped": verdict.skipped}
        values = {key: value.to(strategy.root_device) for key, value in values.items()}
        if statistics.due:
            values |= statistics.layer_values(strategy)
        now, step = time.perf_counter(), trainer.global_step
        row: Row = {"step": step, "tokens": pl_module.tokens_seen, "lr": pl_module.lr}
        row |= {"seconds": round(now - self._began, 6), "time": round(time.time(), 3), "memory": _memory(strategy)}
        if len(statistics.sources) > 1:
            by_source = trainer.datamodule.batches.tokens_by_source(step)  # type: ignore[attr-defined]
            row.update({f"tokens/{name}": tokens for name, tokens in by_source.items()})
        row["mfu"] = utilisation(
            pl_module.model.flops_per_token(trainer.datamodule.batches.context),  # type: ignore[attr-defined]
            pl_module.tokens_per_step / row["seconds"],
            self.rate,
            trainer.world_size,
        )
        row["tokens_per_second"] = pl_module.tokens_per_step / row["seconds"]
        paused, self._paused = self.paused() - self._paused, self.paused()
        self._pending.append(_Pending(row, AsyncHostCopy(values), self._watch.lap(), paused))
        self._began = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._pending or "val/loss" not in trainer.callback_metrics:
            return
        row = self._pending[-1].row
        loss = trainer.callback_metrics["val/loss"].item()
        row["val/loss"] = loss
        row["val/bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        row["val/perplexity"] = math.exp(min(loss, 700.0))
        named = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("val/loss/")}
        row.update({key: value.item() for key, value in named.items()})
        self._watch.mark("")
        self._began = time.perf_counter()  # the next step's time does not count the validation

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        self.write()  # a run that goes on from here has all rows up to here

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write()

    def write(self, behind: int = 0) -> None:
        """Writes the rows of all steps but the last `behind` ones."""
        while len(self._pending) > behind:
            row = self._complete(self._pending.popleft())
            self.latest = row
            self.lines.append(row)
            for listener in self.listeners:
                listener(row)

    def forget(self, step: int) -> None:
        """The steps behind this one do not count any more."""
        while self._spent and self._spent[-1][0] > step:
            self._productive -= self._spent.pop()[1]
        self._began = time.perf_counter()
        self._watch.mark("")
        self._watch.lap()

    def _complete(self, pending: _Pending) -> Row:
        values = pending.flight.values()
        spent, loss, norm = self._watch.seconds(pending.marks), values["train/loss"], values["grad_norm"]
        spent["forward"] = max(0.0, spent.get("forward", 0.0) - pending.paused)  # it begins where the pause does
        self._clipped.append(self.clip is not None and norm > self.clip)
        self._spent.append((pending.row["step"], pending.row["seconds"] / 3600))
        self._productive += self._spent[-1][1]
        hours = self._hours + (pending.row["time"] - self._born) / 3600
        row = {
            "step": pending.row["step"],
            "tokens": pending.row["tokens"],
            "train/loss": loss,
            "train/bits_per_byte": loss / math.log(2) / self.bytes_per_token,
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
        heavier = {key: value for key, value in values.items() if key not in row}
        row.update({key: _rounded(value) for key, value in heavier.items() if value == value})
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }


def _rounded(value: Any) -> Any:
    """Five digits of each number; null for what is not finite."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _memory(strategy: Any) -> int:
    if strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated(strategy.root_device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
