"""Documents that are left out, and why."""

from __future__ import annotations

from dataclasses import dataclass

EMPTY, NOT_UTF8, NOT_JSON, NO_TEXT, TOO_LONG, BINARY, UNREADABLE = (
    "empty",
    "not UTF-8",
    "not JSON",
    "without the text field",
    "a line of more than 16 MiB",
    "binary",
    "in a damaged part of a parquet file",
)
HARMLESS = {EMPTY, BINARY}  # not counted among the rows that cannot be used: they have no text


@dataclass(frozen=True)
class Skipped:
    """A document that is left out.

    Attributes:
        reason: one of the constants above.
        where: file and position, for messages.
        byte: offset of its line in the file, where the number of the line is not known.
        path: the file; with `byte`.
    """

    reason: str
    where: str
    byte: int | None = None
    path: str = ""

    @property
    def line(self) -> str:
        """The file and the line, which is counted for that."""
        if self.byte is None:
            return self.where
        with open(self.path, "rb") as file:
            before = sum(file.read(min(2**20, self.byte - n)).count(b"\n") for n in range(0, self.byte, 2**20))
        return f"{self.path}, line {before + 1}"
