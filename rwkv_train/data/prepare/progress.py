"""Progress of `prepare` on standard error: a bar in a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rwkv_train.console import make_console
from rwkv_train.data.prepare.shards import ShardCounts

_SECONDS_BETWEEN_LINES = 10.0


class PrepareProgress:
    """Shows megabytes read, their rate, tokens and remaining time.

    Args:
        total: size of the input in bytes; None: unknown.

    Attributes:
        counts: sums over the finished shards.
    """

    def __init__(self, total: int | None) -> None:
        self.total, self.done, self.counts = total, 0, ShardCounts()
        self.console = make_console(stderr=True)
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> PrepareProgress:
        if self.console.is_terminal:
            columns = (TextColumn("{task.fields[text]}"), BarColumn(), TimeRemainingColumn(True))
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4)
            self._bar.start()
            self._bar.add_task("", total=self.total, text="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, size: int, counts: ShardCounts) -> None:
        """Counts a finished shard whose unit has `size` bytes."""
        self.done += size
        self.counts.add(counts)
        now = time.monotonic()
        rate = self.done / max(now - self._started, 1e-9)
        text = f"{self.done / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s, {self.counts.tokens:,} tokens"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, text=text)
        elif now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = "" if self.total is None else f", {max(0, self.total - self.done) / rate:,.0f} s left"
            self.console.print(text + left)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text)
