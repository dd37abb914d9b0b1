"""The rank's side of the watchdog: a heartbeat at each phase of training, and a thread that ends the process."""

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
from rwkv_train.cluster.rendezvous import outlive_parent
from rwkv_train.config import WatchdogSettings
from rwkv_train.rundir.attempts import Attempts
from rwkv_train.training.strategy import ShardedStrategy
from rwkv_train.watchdog.connection import listen
from rwkv_train.watchdog.heartbeat import Heartbeat
from rwkv_train.watchdog.verdict import Phase

_ALIVE_INTERVAL = 0.5  # seconds between two records that a thread runs
_AFTER_ALL_BATCHES = 1 << 20  # index after all batches of a validation, where ranks wait for each other's sums
_PR_SET_PTRACER = 0x59616D61  # of prctl


class Watchdog(Callback):
    """Starts this rank's monitor (watchdog/monitor.py), and records in its heartbeat which phase the rank is in.

    A record costs some microseconds: numbers in memory that the monitor reads. The callback must come after those that
    wait for other ranks, so that their waiting is attributed to the step that it belongs to.

    Args:
        settings: limits, and what a straggler is.
        attempts: attempts of the run; stacks and events are written to the current attempt's directory.
        first: whether this is rank 0.
        alone: whether it is the only rank.
        one_node: whether all ranks are on this machine.
        node: name of this rank's node.
        before_exit: called before a verdict ends the process; must be quick.
    """

    def __init__(
        self,
        settings: WatchdogSettings,
        attempts: Attempts,
        first: bool,
        alone: bool,
        one_node: bool,
        node: str,
        before_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.attempts, self.first, self.alone = settings, attempts, first, alone
        self.one_node, self.node, self.before_exit = one_node, node, before_exit
        self.heartbeat = Heartbeat()
        self._channel: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._attempt = 0  # number of the attempt that the monitor knows
        self._micro = 0
        self._began = 0.0  # when the step began
        self._excluded = 0.0  # seconds of the step in validation and checkpoints
        self._paused: float | None = None
        self._work = 0.0
        self._saving_since = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=8)

    @contextmanager
    def watching(self, strategy: ShardedStrategy) -> Iterator[None]:
        """The monitor runs during the block, and gets a message how the block ended.

        Args:
            strategy: knows the address of rank 0.
        """
        if not self.settings.enabled:
            yield
            self.heartbeat.close()
            return
        monitor = self._start(strategy)
        outlive_parent()
        ended = "the process has ended without a message"
        try:
            yield
            ended = ""
        except BaseException as error:
            ended = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise
        finally:
            channel, self._channel = self._channel, None
            assert channel is not None
            with suppress(OSError):
                channel.sendall(json.dumps({"ended": ended}).encode() + b"\n")
            channel.close()
            with suppress(subprocess.TimeoutExpired):
                monitor.wait(1 if ended else 5)
            if monitor.poll() is None and not ended:
                monitor.kill()
                monitor.wait()
            self._close_listener()
            self.heartbeat.close()
            monitor.returncode = monitor.returncode or 0  # one that still judges other ranks is not waited for

    def _start(self, strategy: ShardedStrategy) -> subprocess.Popen[bytes]:
        """Starts the monitor as a child process: a bare interpreter that imports the standard library only."""
        self._channel, remote = socket.socketpair()
        fds = [self.heartbeat.fd, remote.fileno()]
        if self.first and not self.alone:
            self._listener = listen(_main_address(strategy), self.one_node)
            fds.append(self._listener.fileno())
        limits = ("factor", "floor", "startup", "first_step", "checkpoint", "validation")
        beside = Path(sys.executable).with_name("py-spy")
        settings = {
            "pid": os.getpid(),
            "alone": self.alone,
            "memory": self.heartbeat.fd,
            "channel": remote.fileno(),
            "listener": None if self._listener is None else self._listener.fileno(),
            "limits": {name: getattr(self.settings, name) for name in limits},
            "stragglers": [self.settings.slow_factor, self.settings.slow_steps],
            "py_spy": str(beside) if beside.exists() else shutil.which("py-spy"),
        }
        root = str(Path(rwkv_train.__file__).parents[1])
        program = f"import sys; sys.path.insert(0, {root!r}); from rwkv_train.watchdog import monitor; monitor.main()"
        command = [sys.executable, "-I", "-S", "-c", program, json.dumps(settings)]
        with remote:
            monitor = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        with suppress(
            OSError, AttributeError
        ):  # where only a parent may trace a process: py-spy is not this one's parent
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(monitor.pid), 0, 0, 0)
        threading.Thread(target=self._listen, args=(self._channel,), name="watchdog", daemon=True).start()
        return monitor

    def _listen(self, channel: socket.socket) -> None:
        """Runs in a thread: records that the process runs, and ends it when the monitor requests it."""
        received = b""
        while self._channel is channel:
            try:
                self.heartbeat.alive()
                if not select.select([channel], [], [], _ALIVE_INTERVAL)[0]:
                    continue
                data = channel.recv(1 << 16)
            except (OSError, ValueError):  # closed: the run has ended
                return
            if not data:
                return
            received += data
            if b"\n" in received:
                self._exit(json.loads(received.partition(b"\n")[0]))

    def _exit(self, message: dict[str, Any]) -> None:
        """Ends the process, after adding its stacks to the file where py-spy could not write them."""
        with suppress(Exception):  # nothing may keep the process alive now
            if message["stacks"] is not None:
                with open(message["stacks"], "a", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
            self.before_exit()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(int(message["end"]))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The process group exists now: connects the monitors of all ranks."""
        strategy = cast(ShardedStrategy, trainer.strategy)
        host, port, token = "", 0, secrets.token_hex(16)
        if trainer.world_size > 1:
            if trainer.is_global_zero:
                host = _main_address(strategy)
                port = 0 if self._listener is None else self._listener.getsockname()[1]
            host, port, token = strategy.broadcast((host, port, token))
        self._close_listener()
        if self._channel is None:
            return
        join = {
            "rank": trainer.global_rank,
            "ranks": trainer.world_size,
            "node": self.node,
            "directory": self._directory(strategy),
            "address": [host, port],
            "token": token,
        }
        self._channel.sendall(json.dumps({"join": join}).encode() + b"\n")

    def _close_listener(self) -> None:
        """Closes this process's copy; the monitor has its own."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _directory(self, strategy: ShardedStrategy) -> str:
        self._attempt = strategy.attempt
        return str(self.attempts.directory(self._attempt).absolute())

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
        if (
            strategy.attempt != self._attempt and self._channel is not None
        ):  # a rewound run continues as another attempt
            self._channel.sendall(json.dumps({"directory": self._directory(strategy)}).encode() + b"\n")
        if not self._micro:
            self._work = 0.0
            if pl_module.device.type == "cuda":
                self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
                self._events[-1][0].record()
        self.heartbeat.beat(Phase.FORWARD, trainer.global_step, self._micro)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self.heartbeat.beat(Phase.BACKWARD, trainer.global_step, self._micro)

    def _worked(self, trainer: L.Trainer) -> None:
        """This rank's own part of the step, or of a micro-batch, is done."""
        if self._micro == trainer.accumulate_grad_batches - 1 and not self._work:
            self._work = time.perf_counter() - self._began - self._excluded
            if self._events:
                self._events[-1][1].record()
            self.heartbeat.beat(Phase.OPTIMISER, trainer.global_step)

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
        self.heartbeat.step_done(now - self._began - self._excluded, self._device_work() or self._work)
        self.heartbeat.saving(0.0 if cast(ShardedStrategy, trainer.strategy).writer.idle else self._saving_since)
        self.heartbeat.beat(Phase.DATA, step)
        self._began, self._excluded = now, 0.0

    def _device_work(self) -> float:
        """Seconds of the device's own work in the newest step that it has finished; the device is not waited for."""
        for begin, end in reversed(self._events):
            if begin.query() and end.query():
                with suppress(RuntimeError):  # the hook was not called in this step
                    return float(begin.elapsed_time(end)) / 1e3
        return 0.0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause()
        self._saving_since = time.monotonic()
        self.heartbeat.saving(0.0 if cast(ShardedStrategy, trainer.strategy).writer.idle else self._saving_since)
        self.heartbeat.beat(Phase.CHECKPOINT, trainer.global_step)

    def waiting_for_disk(self, step: int) -> None:
        """Training waits for a save or for a restore, for which the limit of a checkpoint holds."""
        self._pause()
        self.heartbeat.beat(Phase.CHECKPOINT, step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause()
        self.heartbeat.beat(Phase.VALIDATION, trainer.global_step)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.heartbeat.beat(Phase.VALIDATION, trainer.global_step, batch_idx + (dataloader_idx << 10))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.heartbeat.beat(Phase.VALIDATION, trainer.global_step, _AFTER_ALL_BATCHES)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.heartbeat.beat(Phase.DATA, trainer.global_step)
        self._resume()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.heartbeat.beat(Phase.END, trainer.global_step)

    def _pause(self) -> None:
        if self._paused is None:
            self._paused = time.perf_counter()

    def _resume(self) -> None:
        if self._paused is not None:
            self._excluded += time.perf_counter() - self._paused
            self._paused = None


def _main_address(strategy: ShardedStrategy) -> str:
    """The host of rank 0, by the name or the address that the other ranks use."""
    return str(strategy.cluster_environment.main_address)  # type: ignore[attr-defined]
