"""Text for people: consoles that print texts as they are, and output that may fail without ending the program."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

ERROR_STYLE = "bold red"
# C0 without tab and line feed, C1, and the marks and overrides of Unicode's bidirectional algorithm
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def make_console(quiet: bool = False, stderr: bool = False) -> Console:
    """A console that takes no text for markup, and sends a terminal no control character of a text.

    Paths, messages and documents hold square brackets, and may hold what strangers have put there.

    Args:
        quiet: whether it prints nothing.
        stderr: whether it prints on standard error.
    """
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text) if self.is_terminal else text, **options)

    return PlainConsole(quiet=quiet, stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def visible(text: str) -> str:
    r"""A text whose control characters are written as `\x1b`: they would move the cursor, rename the window, or worse.

    Line feeds and tabs stay. Marks that change the direction of writing are written as `\u202e`.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1] if found[0] != "\r" else "\\x0d", text)


def for_stream(text: str, stream: TextIO) -> str:
    """A text as it is for a file or a pipe, `visible` for a terminal."""
    return visible(text) if stream.isatty() else text


class TolerantOutput:
    """A text stream in front of another one, whose errors it counts: a full disk or a closed pipe ends no run.

    Args:
        stream: standard output or standard error.

    Attributes:
        lost: number of writes that failed.
        reason: of the last one; None: none has failed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = 0
        self.reason: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._tolerated():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._tolerated():
            self._stream.flush()

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.lost += 1
            self.reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)

    def end(self) -> None:
        """Leaves nothing in the stream's buffer: Python flushes it once more, and exits with 120 where that fails."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def replace_unknown_characters() -> None:
    """Lets standard output and standard error print a question mark for what the terminal's encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            with suppress(OSError, ValueError):  # what it still holds cannot be written
                stream.reconfigure(errors="replace")


@contextmanager
def tolerated_output() -> Iterator[None]:
    """In the block, errors of standard output and standard error are counted, and reported at its end where possible.

    Characters that the terminal does not know are replaced.
    """
    if sys.stdout is None or sys.stderr is None:  # closed by the shell (>&-): Python prints nothing then
        yield
        return
    before = sys.stdout, sys.stderr
    out, err = (TolerantOutput(stream) for stream in before)
    replace_unknown_characters()
    sys.stdout, sys.stderr = cast("TextIO", out), cast("TextIO", err)
    try:
        yield
    finally:
        out.flush()
        if out.lost:
            err.write(f"{out.lost} writes to standard output failed: {out.reason}\n")
        for ended in (out, err):
            ended.end()
        sys.stdout, sys.stderr = before
