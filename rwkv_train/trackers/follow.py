"""The process of one tracker: reads metrics.jsonl and events.jsonl as they grow, and hands them over.

It is told what to do by a line of JSON on its standard input; the end of the input is the end of the training process,
however it ended. What is in the files by then is handed over still.
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
from rwkv_train.trackers import Row, Run, Tracker

POLL = 1.0  # seconds between two looks at the files
RETRIES = (5, 30, 120, 600)  # seconds before a tracker that has failed is tried again
AT_ONCE = 2000  # rows between two flushes


class Tail:
    """The lines that were added to a file since the last look; one that was cut in between is noticed.

    Args:
        path: a file of JSON lines, which may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at, self._last = 0, b""

    def rows(self) -> Iterator[dict[str, Any]]:
        """New whole rows. After a cut all rows come again, from the first on."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return
        with file:
            file.seek(max(0, self._at - len(self._last)))
            if file.read(len(self._last)) != self._last:
                self._at = 0
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._at += len(line)
                self._last = line
                yield json.loads(line)


class Follower:
    """Keeps a tracker up to date with a run's files.

    Args:
        tracker: gets what is new.
        run: told to it.
        step: from which the run goes on; 0: a new one.
        notes: the file in which the tracker's state is kept.
        rows, events: metrics.jsonl and events.jsonl, which grow, and are made anew where a run begins or goes back.
    """

    def __init__(self, tracker: Tracker, run: Run, step: int, notes: Path, rows: Path, events: Path) -> None:
        self.tracker, self.run, self.step, self.notes = tracker, run, step, notes
        self._rows, self._events = Tail(rows), Tail(events)
        self._told: set[str] = set()  # events
        self.since = time.time()
        self._last = 0  # step that was handed over last
        self._open = False
        if notes.exists():
            tracker.state.update(json.loads(notes.read_text()))

    def catch_up(self) -> int:
        """Hands over what is new; the number of rows."""
        if not self._open:
            self._go_on(self.tracker.begin(self.run, self.step))
            self._open = True
        for event in self._events.rows():  # before the rows: what was written behind a rewind stands behind its event
            known = json.dumps(event)
            if event["time"] < self.since or known in self._told:
                continue
            self._told.add(known)
            if event["event"] == "rewound":
                self._rows = Tail(self._rows.path)
                self._go_on(self.tracker.back(event["step"]))
            self.tracker.event(event)
        count = 0
        for row in self._rows.rows():
            if row["step"] > self._last:
                self._take(row)
                count += 1
                if count % AT_ONCE == 0:
                    self._flush()
        if count:
            self._flush()
        return count

    def fail(self) -> None:
        """The tracker has raised: the next call of `catch_up` opens it anew, from what it is known to have."""
        self._open, self._rows = False, Tail(self._rows.path)
        self.step = max(self.step, self._last)

    def _go_on(self, behind: int) -> None:
        self._last = behind
        if "sent" in self.tracker.state:  # what is done again counts, and is there only when it was sent again
            self.tracker.state["sent"] = min(self.tracker.state["sent"], behind)
        self._note()

    def _flush(self) -> None:
        self.tracker.flush()
        self._note()

    def _take(self, row: Row) -> None:
        self.tracker.row(row)
        self._last = row["step"]

    def _note(self) -> None:
        self.notes.parent.mkdir(exist_ok=True)
        aside = self.notes.with_name(f".{self.notes.name}")
        aside.write_text(json.dumps(self.tracker.state))
        aside.replace(self.notes)

    def end(self) -> None:
        self.tracker.end()
        self._note()


def follow(follower: Follower, over: Callable[[float], bool], tell: Callable[[str], None]) -> None:
    """Keeps a tracker up to date until the run is over, however often it fails; a failure is told once.

    Args:
        follower: of the tracker.
        over: waits so many seconds at most, and says whether the run has ended.
        tell: where a failure is told.
    """
    failures, ended = 0, False
    while True:
        try:
            new = follower.catch_up()
            if ended and not new:
                follower.end()
                return
            failures = 0
            ended = over(0.0 if ended else POLL)
        except Exception as error:  # others' code: whatever it raises, the run is not to know
            if not failures:
                tell(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if ended:
                return
            follower.fail()
            ended = over(RETRIES[min(failures, len(RETRIES) - 1)])
            failures += 1


def make(name: str, tree: Mapping[str, Any], packages: Sequence[str]) -> Tracker:
    """The tracker of an entry of `logger`.

    Raises:
        UserErrors: its class cannot be found, or its arguments do not fit.
    """
    makers: Makers[Any] = prepare("logger", {name: tree}, (Tracker, _lightnings(tree)), packages)
    tracker = makers[0]()
    if isinstance(tracker, Tracker):
        return tracker
    from rwkv_train.trackers.lightning import OfLightning

    return OfLightning(tracker)


def _lightnings(tree: Mapping[str, Any]) -> type:
    """Lightning's base class of loggers; it takes seconds to import, so only where it is asked for."""
    if str(tree.get("_target_", "")).startswith("rwkv_train."):
        return Tracker
    from lightning.pytorch.loggers import Logger

    return Logger


def main() -> int:
    """What `python -m rwkv_train.trackers.follow` does."""
    told = json.loads(sys.stdin.buffer.readline())
    name = told["name"]

    def tell(text: str) -> None:
        print(f"\nlogger={name}: {text}; the run goes on, and its rows wait", file=sys.stderr, flush=True)

    def over(seconds: float) -> bool:
        return bool(select.select([sys.stdin], [], [], seconds)[0])

    try:
        tracker = make(name, told["tree"], told["packages"])
    except UserError as error:
        tell(str(error))
        return 1
    path = Path(told["path"])
    run = Run(path, told["run"], told["info"], told["changed"])
    notes = path / "trackers" / f"{name}.json"
    follow(Follower(tracker, run, told["step"], notes, Path(told["rows"]), Path(told["events"])), over, tell)
    return 0


if __name__ == "__main__":
    sys.exit(main())
