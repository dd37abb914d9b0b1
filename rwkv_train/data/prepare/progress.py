"""What a person sees of a `prepare`: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from rwkv_train.data.prepare.shards import Counts

_PLAIN_SECONDS = 10.0


class Progress:
    """Megabytes read per second and time left.

    Args:
        total: bytes that there are to read; None: nobody knows.
    """

    def __init__(self, total: int | None) -> None:
        self.total, self.done, self.counts = total, 0, Counts()
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._began = self._spoke = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            columns = (TextColumn("{task.fields[text]}"), BarColumn(), TimeRemainingColumn(True))
            self._bar = Bar(*columns, console=self.console, refresh_per_second=4)
            self._bar.start()
            self._bar.add_task("", total=self.total, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, size: int, counts: Counts) -> None:
        """A shard is done that `size` bytes were read for."""
        self.done += size
        self.counts.add(counts)
        now = time.monotonic()
        rate = self.done / max(now - self._began, 1e-9)
        text = f"{self.done / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s, {self.counts.tokens:,} tokens"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, text=text)
        elif now - self._spoke > _PLAIN_SECONDS:
            self._spoke = now
            left = "" if self.total is None else f", {max(0, self.total - self.done) / rate:,.0f} s left"
            self.console.print(text + left)

    def say(self, text: str) -> None:
        self.console.print(text)
