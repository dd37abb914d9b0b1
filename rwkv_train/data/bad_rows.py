"""One policy for rows that cannot be used: left out, counted, the first five named; an error where there are many."""

from __future__ import annotations

from dataclasses import dataclass, field

from rwkv_train.errors import UserError

MAX_NAMED = 5
_FIRST_ROWS = 1000  # before so many are read, as many bad ones are allowed as among these


@dataclass
class BadRows:
    """Counts the rows of a source.

    Attributes:
        limit: share of bad rows that is left out without an error.
        setting: the name of `limit`, as it is typed.
        rows: rows that were read, with the bad ones.
        bad: number of bad rows.
        named: the first of them: where each is, and what is wrong.
    """

    limit: float
    setting: str = "data.max_bad_rows="
    rows: int = 0
    bad: int = 0
    named: list[str] = field(default_factory=list)

    def leave_out(self, where: str, reason: str) -> None:
        """Counts a bad row, and raises the error that `check` raises if there are too many.

        Args:
            where: file and line.
            reason: what is wrong with it.
        """
        self.rows += 1
        self.bad += 1
        if len(self.named) < MAX_NAMED and (row := f"{where}: {reason}") not in self.named:  # it may be read again
            self.named.append(row)
        self.check(complete=False)

    def check(self, complete: bool) -> None:
        """Refuses a source of which too many rows are bad.

        Args:
            complete: whether all rows have been read; before, a few bad ones at the beginning say little.

        Raises:
            UserError: more than the share `limit` of them are bad.
        """
        if self.bad > self.limit * (self.rows if complete else max(self.rows, _FIRST_ROWS)):
            raise UserError(
                f"{self.bad:,} of {self.rows:,} rows cannot be used, more than {self.setting}{self.limit:g} allows:"
                + "".join(f"\n    {row}" for row in self.named),
                f"correct or remove them, or allow a larger share: {self.setting}… (1: all of them)",
            )

    @property
    def description(self) -> str:
        """How many were left out, and the first of them; empty if none."""
        return f"left out: {self.bad:,} of {self.rows:,} rows: {'; '.join(self.named)}" if self.bad else ""
