"""The process of one tracker: reads metrics.jsonl and events.jsonl as they grow, and hands their rows over.

It gets its settings as a line of JSON on standard input. The end of the input means that the training process has
ended, however it did; the process then hands over what the files have by that time, and ends.
"""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_train.errors import UserError
from rwkv_train.instantiate import Makers, prepare
from rwkv_train.rundir.durable import write_state
from rwkv_train.rundir.record_lines import event_row, metrics_row
from rwkv_train.trackers import LocalTracker, TrackedRun, Tracker, read_state

POLL_INTERVAL = 1.0  # seconds between two reads of the files
RETRY_DELAYS = (5, 30, 120, 600)  # seconds before a tracker that has failed is tried again
ROWS_PER_FLUSH = 2000


class Tail:
    """Reads the lines that were added to a file since the last read; notices when the file was replaced or cut.

    Lines that are no records are left out; the run's next start and `rwkv-train status` name them.

    Args:
        path: a file of JSON lines, which need not exist yet.
        parse: `metrics_row` or `event_row`.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], dict[str, Any] | None] = metrics_row) -> None:
        self.path, self._parse = path, parse
        self._offset, self._last_line = 0, b""

    def rows(self) -> Iterator[dict[str, Any]]:
        """New complete rows. If the file was replaced, all rows come again, from the first on."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return
        with file:
            file.seek(max(0, self._offset - len(self._last_line)))
            if file.read(len(self._last_line)) != self._last_line:
                self._offset = 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._last_line = line
                if (row := self._parse(line)) is not None:
                    yield row


class Follower:
    """Keeps a tracker up to date with a run's files.

    Args:
        tracker: gets new rows and events.
        run: the run, for the tracker.
        step: the step from which the run continues; 0 for a new run.
        notes: file in which the tracker's state is kept.
        rows, events: metrics.jsonl and events.jsonl, which grow, and are replaced when a run resumes or is rewound.

    Attributes:
        since: Unix seconds; earlier events are not handed over.
        note: why the tracker's state could not be read; None: it could, or there is none.
    """

    def __init__(self, tracker: Tracker, run: TrackedRun, step: int, notes: Path, rows: Path, events: Path) -> None:
        self.tracker, self.run, self.step, self.notes = tracker, run, step, notes
        self._rows, self._events = Tail(rows), Tail(events, event_row)
        self._seen: set[str] = set()  # events that were handed over
        self.since = time.time()
        self._last = 0  # step of the last row that was handed over
        self._open = False
        self.note: str | None = None
        try:
            tracker.state.update(read_state(notes))
        except ValueError as error:
            self.note = str(error)

    def catch_up(self) -> int:
        """Hands over new rows and events; returns the number of rows."""
        if not self._open:
            self._continue_after(self.tracker.begin(self.run, self.step))
            self._open = True
        for event in self._events.rows():  # before the rows: rows after a rewind come after its event
            known = json.dumps(event)
            if event["time"] < self.since or known in self._seen:
                continue
            self._seen.add(known)
            if event["event"] == "rewound":
                self._rows = Tail(self._rows.path)
                self._continue_after(self.tracker.back(event["step"]))
            self.tracker.event(event)
        count = 0
        for row in self._rows.rows():
            if row["step"] > self._last:
                self.tracker.row(row)
                self._last = row["step"]
                count += 1
                if count % ROWS_PER_FLUSH == 0:
                    self._flush()
        if count:
            self._flush()
        return count

    def fail(self) -> None:
        """The tracker has raised: the next `catch_up` opens it again, from what it is known to have."""
        self._open, self._rows = False, Tail(self._rows.path)
        self.step = max(self.step, self._last)

    def _continue_after(self, step: int) -> None:
        self._last = step
        if "sent" in self.tracker.state:  # repeated steps count, and are stored only after they were sent again
            self.tracker.state["sent"] = min(self.tracker.state["sent"], step)
        write_state(self.notes, self.tracker.state)

    def _flush(self) -> None:
        self.tracker.flush()
        write_state(self.notes, self.tracker.state)

    def end(self) -> None:
        self.tracker.end()
        write_state(self.notes, self.tracker.state)


def follow(follower: Follower, over: Callable[[float], bool], report: Callable[[str], None]) -> None:
    """Keeps a tracker up to date until the run is over, however often it fails; a failure is reported once.

    Args:
        follower: of the tracker.
        over: waits at most so many seconds, and returns whether the run has ended.
        report: called with a failure.
    """
    failures, ended = 0, False
    while True:
        try:
            new = follower.catch_up()
            if ended and not new:
                follower.end()
                return
            failures = 0
            ended = over(0.0 if ended else POLL_INTERVAL)
        except Exception as error:  # code of other packages: whatever it raises, training continues
            if not failures:
                report(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if ended:
                return
            follower.fail()
            ended = over(RETRY_DELAYS[min(failures, len(RETRY_DELAYS) - 1)])
            failures += 1


def make(name: str, tree: Mapping[str, Any], packages: Sequence[str]) -> Tracker | LocalTracker:
    """The tracker of an entry of `logger`.

    Raises:
        UserErrors: its class cannot be found, or its arguments do not fit.
    """
    makers: Makers[Any]
    try:
        makers = prepare("logger", {name: tree}, (Tracker, LocalTracker), packages)
    except UserError:  # not a tracker of ours; Lightning's base class takes seconds to import
        from lightning.pytorch.loggers import Logger

        makers = prepare("logger", {name: tree}, (Tracker, LocalTracker, Logger), packages)
    tracker = makers[0]()
    if isinstance(tracker, (Tracker, LocalTracker)):
        return tracker
    from rwkv_train.trackers.lightning import LightningTracker

    return LightningTracker(tracker)


def main() -> int:
    """`python -m rwkv_train.trackers.follow`."""
    settings = json.loads(sys.stdin.buffer.readline())
    name = settings["name"]

    def report(text: str) -> None:
        print(f"\nlogger={name}: {text}; training continues, it gets its rows later", file=sys.stderr, flush=True)

    def over(seconds: float) -> bool:
        return bool(select.select([sys.stdin], [], [], seconds)[0])

    try:
        tracker = make(name, settings["tree"], settings["packages"])
    except UserError as error:
        report(str(error))
        return 1
    assert isinstance(tracker, Tracker)
    path = Path(settings["path"])
    run = TrackedRun(path, settings["run"], settings["info"], settings["changed"])
    notes = path / "trackers" / f"{name}.json"
    follower = Follower(tracker, run, settings["step"], notes, Path(settings["rows"]), Path(settings["events"]))
    if follower.note is not None:
        report(f"{follower.note}: it begins a new copy")
    follow(follower, over, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
