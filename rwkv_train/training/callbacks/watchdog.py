"""The rank's side of the watchdog: its heartbeat at each turn of the training, and the thread that hears the end."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

import rwkv_train
from rwkv_train.config import WatchdogSettings
from rwkv_train.rundir.attempts import Attempts
from rwkv_train.training.strategy import ShardedStrategy
from rwkv_train.watchdog.heartbeat import Heartbeat
from rwkv_train.watchdog.verdict import Phase

_PULSE = 0.5  # seconds between two signs of life
_EVERYTHING = 1 << 20  # an index behind all batches of a validation: the rank waits for the others' sums
_MAY_TRACE = 0x59616D61  # prctl's PR_SET_PTRACER


class Watchdog(Callback):
    """Starts this rank's guard (watchdog/monitor.py) and tells it at each turn where the rank is.

    A turn costs some microseconds: numbers in memory that the guard reads. Must stand behind the callbacks that
    wait for other ranks, so that their waiting counts for the step that it belongs to.

    Args:
        settings: limits, and what is a straggler.
        attempts: of the run; stacks and events go where this one's records are.
        first: whether this is the run's first process.
        alone: whether it is the only one.
        node: the name of this rank's.
        last_words: called before a verdict ends the process; must be quick.
    """

    def __init__(
        self,
        settings: WatchdogSettings,
        attempts: Attempts,
        first: bool,
        alone: bool,
        node: str,
        last_words: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.attempts, self.first, self.alone = settings, attempts, first, alone
        self.node, self.last_words = node, last_words
        self.heart = Heartbeat()
        self._words: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._number = 0  # the attempt that the guard knows
        self._micro = 0
        self._began = 0.0  # of the step
        self._apart = 0.0  # seconds of it in validation and checkpoints
        self._paused: float | None = None
        self._work = 0.0
        self._saving_since = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=8)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The guard watches while the block runs, and is told how it ends."""
        if not self.settings.enabled:
            yield
            self.heart.close()
            return
        guard = self._start()
        ended = "the process has left without a word"
        try:
            yield
            ended = ""
        except BaseException as error:
            ended = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise
        finally:
            words, self._words = self._words, None
            assert words is not None
            with suppress(OSError):
                words.sendall(json.dumps({"ended": ended}).encode() + b"\n")
            words.close()
            with suppress(subprocess.TimeoutExpired):
                guard.wait(1 if ended else 5)
            if guard.poll() is None and not ended:
                guard.kill()
                guard.wait()
            self._close_listener()
            self.heart.close()
            guard.returncode = guard.returncode or 0  # one that still judges the others is nobody's to wait for

    def _start(self) -> subprocess.Popen[bytes]:
        """The guard as a child of this process: a bare interpreter that imports the standard library and two files."""
        self._words, theirs = socket.socketpair()
        fds = [self.heart.fd, theirs.fileno()]
        if self.first and not self.alone:
            self._listener = socket.create_server(("", 0), backlog=4096)
            fds.append(self._listener.fileno())
        limits = ("factor", "floor", "startup", "first_step", "checkpoint", "validation")
        beside = Path(sys.executable).with_name("py-spy")
        settings = {
            "pid": os.getpid(),
            "alone": self.alone,
            "memory": self.heart.fd,
            "words": theirs.fileno(),
            "listener": None if self._listener is None else self._listener.fileno(),
            "limits": {name: getattr(self.settings, name) for name in limits},
            "stragglers": [self.settings.slow_factor, self.settings.slow_steps],
            "py_spy": str(beside) if beside.exists() else shutil.which("py-spy"),
        }
        root = str(Path(rwkv_train.__file__).parents[1])
        door = (
            f"import sys; sys.path.insert(0, {root!r}); from rwkv_train.watchdog import monitor as guard; guard.main()"
        )
        command = [sys.executable, "-I", "-S", "-c", door, json.dumps(settings)]
        with theirs:
            guard = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        with suppress(OSError, AttributeError):  # where only a parent may look into a process: py-spy is no parent
            ctypes.CDLL(None).prctl(_MAY_TRACE, ctypes.c_ulong(guard.pid), 0, 0, 0)
        threading.Thread(target=self._listen, args=(self._words,), name="watchdog", daemon=True).start()
        return guard

    def _listen(self, words: socket.socket) -> None:
        """Shows that the process runs, and ends it when the guard says so; in a thread."""
        came = b""
        while self._words is words:
            try:
                self.heart.alive()
                if not select.select([words], [], [], _PULSE)[0]:
                    continue
                data = words.recv(1 << 16)
            except (OSError, ValueError):  # closed: the run has ended
                return
            if not data:
                return
            came += data
            if b"\n" in came:
                self._leave(json.loads(came.partition(b"\n")[0]))

    def _leave(self, word: dict[str, Any]) -> None:
        with suppress(Exception):  # nothing may keep this process now
            if word["stacks"] is not None:
                with open(word["stacks"], "a", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
            self.last_words()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(int(word["end"]))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The ranks know each other now: the guards shall, too."""
        strategy = cast(ShardedStrategy, trainer.strategy)
        host, port, token = "", 0, secrets.token_hex(16)
        if trainer.world_size > 1:
            if trainer.is_global_zero:
                host = strategy.cluster_environment.main_address  # type: ignore[attr-defined]
                port = 0 if self._listener is None else self._listener.getsockname()[1]
            host, port, token = strategy.broadcast((host, port, token))
        self._close_listener()
        if self._words is None:
            return
        join = {
            "rank": trainer.global_rank,
            "ranks": trainer.world_size,
            "node": self.node,
            "directory": self._directory(strategy),
            "address": [host, port],
            "token": token,
        }
        self._words.sendall(json.dumps({"join": join}).encode() + b"\n")

    def _close_listener(self) -> None:
        """The guard has its own."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _directory(self, strategy: ShardedStrategy) -> str:
        self._number = strategy.attempt
        return str(self.attempts.directory(self._number).absolute())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy = cast(ShardedStrategy, trainer.strategy)
        if trainer.world_size > 1 and not strategy.sharded:
            # parameters are registered in the order of the forward pass: the first one gets its gradient last, then
            # a rank only waits for the others
            _, first = next(strategy.trainable_weights())
            first.register_post_accumulate_grad_hook(lambda _: self._worked(trainer))
        self._began = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._resume()
        self._micro = batch_idx % trainer.accumulate_grad_batches
        strategy = cast(ShardedStrategy, trainer.strategy)
        if strategy.attempt != self._number and self._words is not None:  # a run that went back is another one
            self._words.sendall(json.dumps({"directory": self._directory(strategy)}).encode() + b"\n")
        if not self._micro:
            self._work = 0.0
            if pl_module.device.type == "cuda":
                self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
                self._events[-1][0].record()
        self.heart.beat(Phase.FORWARD, trainer.global_step, self._micro)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self.heart.beat(Phase.BACKWARD, trainer.global_step, self._micro)

    def _worked(self, trainer: L.Trainer) -> None:
        """This rank has done its own part of the step, or of a pass."""
        if self._micro == trainer.accumulate_grad_batches - 1 and not self._work:
            self._work = time.perf_counter() - self._began - self._apart
            if self._events:
                self._events[-1][1].record()
            self.heart.beat(Phase.OPTIMISER, trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._worked(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._micro < trainer.accumulate_grad_batches - 1:
            return
        now = time.perf_counter()
        step = trainer.global_step
        self.heart.stepped(now - self._began - self._apart, self._device_work() or self._work)
        self.heart.writing(0.0 if cast(ShardedStrategy, trainer.strategy).writer.idle else self._saving_since)
        self.heart.beat(Phase.DATA, step)
        self._began, self._apart = now, 0.0

    def _device_work(self) -> float:
        """Seconds of a device's own work in the newest step that it has finished; it is not waited for."""
        for begin, end in reversed(self._events):
            if begin.query() and end.query():
                with suppress(RuntimeError):  # a step that the hook did not see
                    return float(begin.elapsed_time(end)) / 1e3
        return 0.0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause()
        self._saving_since = time.monotonic()
        self.heart.writing(0.0 if cast(ShardedStrategy, trainer.strategy).writer.idle else self._saving_since)
        self.heart.beat(Phase.CHECKPOINT, trainer.global_step)

    def restoring(self, step: int) -> None:
        """The run goes back to a checkpoint, which takes as long as one may take."""
        self._pause()
        self.heart.beat(Phase.CHECKPOINT, step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause()
        self.heart.beat(Phase.VALIDATION, trainer.global_step)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.heart.beat(Phase.VALIDATION, trainer.global_step, batch_idx + (dataloader_idx << 10))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.heart.beat(Phase.VALIDATION, trainer.global_step, _EVERYTHING)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.heart.beat(Phase.DATA, trainer.global_step)
        self._resume()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.heart.beat(Phase.END, trainer.global_step)

    def _pause(self) -> None:
        if self._paused is None:
            self._paused = time.perf_counter()

    def _resume(self) -> None:
        if self._paused is not None:
            self._apart += time.perf_counter() - self._paused
            self._paused = None
