"""Lines of metrics.jsonl and events.jsonl: what cannot be read is left out and named, and stops nothing.

A node that dies leaves zero bytes in a file, a full disk half a line. The run, `status`, the report and the trackers
read records with these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_train.json_files import parse_json, read_regular, reason_of

_NAMED = 5  # lines of a file that are named; the others are counted
_MAX_STEP = 2**53
_NUMBERS = (  # values that this package computes with
    "time",
    "tokens",
    "seconds",
    "hours",
    "goodput",
    "pause",
    "reached",
    "steps_lost",
    "seconds_lost",
    "seconds_down",
    "seconds_starting",
)


class Record(NamedTuple):
    """A line and what it says."""

    line: bytes
    row: dict[str, Any]


def metrics_row(line: bytes | str) -> dict[str, Any] | None:
    """The row in a line of metrics.jsonl; None: the line is none."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] <= _MAX_STEP:
        return None
    return row if all(_is_number(row[key]) for key in _NUMBERS if key in row) else None


def event_row(line: bytes | str) -> dict[str, Any] | None:
    """The event in a line of events.jsonl or watchdog.jsonl; None: the line is none."""
    row = metrics_row(line)
    return row if row is not None and isinstance(row.get("event"), str) and "time" in row else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not


@dataclass
class LeftOut:
    """What could not be read of record files.

    Attributes:
        lines: file → numbers of the lines that are no records, from 1.
        files: file → why it cannot be read at all.
    """

    lines: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def texts(self) -> list[str]:
        """A sentence for each file."""
        found = [f"{file} cannot be read: {reason}" for file, reason in self.files.items()]
        for file, numbers in self.lines.items():
            which = ", ".join(map(str, numbers[:_NAMED])) + (", …" if len(numbers) > _NAMED else "")
            one = len(numbers) == 1
            found.append(
                f"{file}: left out {len(numbers)} {'line that is no record' if one else 'lines that are no records'} "
                f"({'line' if one else 'lines'} {which})"
            )
        return found


def records_in(
    lines: Iterable[bytes], parse: Callable[[bytes], dict[str, Any] | None], file: str, left_out: LeftOut
) -> Iterator[Record]:
    """The records among a file's lines.

    Args:
        lines: from the first on.
        parse: `metrics_row` or `event_row`.
        file: the name under which others are counted.
        left_out: where they are counted.
    """
    left_out.lines.pop(file, None)
    for number, line in enumerate(lines, 1):
        if (row := parse(line)) is not None:
            yield Record(line, row)
        else:
            left_out.lines.setdefault(file, []).append(number)


def complete_lines(path: Path, file: str, left_out: LeftOut) -> list[bytes] | None:
    """The complete lines of a file; a last one that a kill has cut off is not among them.

    Returns:
        no line where the file is missing; None where it is there and cannot be read, which is noted in `left_out`.
    """
    left_out.files.pop(file, None)
    try:
        content = read_regular(path, limit=None)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        left_out.files[file] = reason_of(error)
        return None
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
