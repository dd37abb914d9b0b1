"""Attempts of one run that are alive at the same time, on a real directory, interleaved at every file operation.

Each rank of each attempt is a thread that runs the real code: the claim, the start note, the records, the writer, the
deletion of old checkpoints. One thread runs at a time. Python's audit hook stops it before every file operation, and a
seeded draw decides which one runs next: a process can be paused between any check and any write for any time, be killed
there, or wake up long after another attempt has taken over.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from rwkv_train.checkpoint.directory import list_checkpoints, newest, newest_to_resume, remove_unfinished, verify
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.storage import LocalStorage
from rwkv_train.checkpoint.writer import Writer
from rwkv_train.config import CheckpointSettings, Duration
from rwkv_train.errors import UserError
from rwkv_train.rundir.attempts import Superseded
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback
from tests.checkpoint.metas import meta_of

EVERY, STEPS = 3, 12
OPERATIONS = {"open", "os.listdir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.truncate"}


class Killed(BaseException):
    """kill -9, or the end of the schedule."""


class Process(threading.Thread):
    """One rank: runs while it holds the baton, and returns it before each file operation."""

    def __init__(self, world: World, name: str, body: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.world, self.body = world, body
        self.baton, self.killed, self.done = threading.Semaphore(0), False, False
        self.asleep = 0  # turns

    def run(self) -> None:
        self.baton.acquire()
        try:
            if not self.killed:
                self.body()
        except Killed:
            pass
        except Exception as error:
            self.world.problems.append(f"{self.name}: {type(error).__name__}: {error}")
        finally:
            self.done = True
            self.world.back.release()

    def point(self) -> None:
        """Lets another process run."""
        self.world.back.release()
        self.baton.acquire()
        if self.killed:
            raise Killed


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    process = threading.current_thread()
    if event not in OPERATIONS or not isinstance(process, Process) or process.done:
        return
    path = arguments[0]
    if (
        isinstance(path, (str, Path))
        and str(path).startswith("/")
        and not str(path).startswith(str(process.world.folder))
    ):
        return  # Python's own, such as a module's source; relative names are those of shutil.rmtree
    process.world.note(process, event, arguments)
    process.point()


_hooked = False


class Store:
    """The ranks' key-value store of one attempt."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def delete_key(self, key: str) -> bool:
        return self.values.pop(key, None) is not None

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        for _ in range(300):
            if all(key in self.values for key in keys):
                return
            process = threading.current_thread()
            assert isinstance(process, Process)
            process.point()
        raise TimeoutError("no message from a rank")


class Disk(LocalStorage):
    """Without the calls that only wait for a real disk."""

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)


class World:
    """One schedule.

    Args:
        folder: an empty directory.
        seed: seed of which process runs when, sleeps or is killed.
        ranks: number of ranks of each attempt.
        attempts: number of attempts; a new one begins while earlier ones may still be alive.
    """

    def __init__(self, folder: Path, seed: int, ranks: int = 2, attempts: int = 3) -> None:
        global _hooked
        if not _hooked:
            sys.addaudithook(_audit)
            _hooked = True
        self.folder, self.draw, self.ranks, self.left = folder, random.Random(seed), ranks, attempts
        self.run = RunDirectory(str(folder), "run")
        self.run.checkpoints.mkdir(parents=True)
        self.keep = 1 + seed % 2
        self.back = threading.Semaphore(0)
        self.processes: list[Process] = []
        self.problems: list[str] = []
        self.writers: dict[str, set[str]] = {}  # file → attempts that have opened it for writing

    def note(self, process: Process, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, Path)) and any(c in str(arguments[1]) for c in "wax+"):
            self.writers.setdefault(str(arguments[0]), set()).add(process.name.split(".")[0])

    def launch(self) -> None:
        self.left -= 1
        store, shared = Store(), dict[str, int]()
        for rank in range(self.ranks):
            body = partial(self.other, shared, store, rank) if rank else partial(self.first, shared, store)
            process = Process(self, f"start{self.left}.{rank}", body)
            process.start()
            self.processes.append(process)

    def schedule(self, turns: int = 4000) -> None:
        """Runs the schedule; processes that have not ended by then are killed."""
        self.launch()
        for _ in range(turns):
            alive = [process for process in self.processes if not process.done]
            if self.left and (not alive or self.draw.random() < 0.01):
                self.launch()
                continue
            if not alive:
                break
            awake = [process for process in alive if not process.asleep] or alive
            for process in alive:
                process.asleep = max(0, process.asleep - 1)
            process, dice = self.draw.choice(awake), self.draw.random()
            if dice < 0.003:
                process.killed = True
            elif dice < 0.02:
                process.asleep = self.draw.choice((20, 200, 1000))  # paused; wakes up later
                continue
            process.baton.release()
            self.back.acquire()
        for process in self.processes:
            while not process.done:
                process.killed = True
                process.baton.release()
                self.back.acquire()
            process.join()

    def save(self, number: int, step: int, rank: int, store: Store) -> str | None:
        """A rank's part of a save by the real writer, followed by the real deletion; returns why it failed."""
        settings = CheckpointSettings(Duration(steps=EVERY), self.keep, None, False, True)
        policy = CheckpointCallback(self.run.checkpoints, settings, 1, None, {}, None, Disk())  # type: ignore[arg-type]
        policy._attempt = number
        writer = Writer(Disk(), rank, self.ranks, store, policy._retain)
        part = {f"part_{rank}.json": [number, step, rank]}
        final = self.run.checkpoints / str(CheckpointName(step, number))
        writer._save(final, part, meta_of(step=step), str(step))
        (outcome,) = writer.finished()
        if outcome.trouble is not None:
            self.problems.append(f"{final.name}: {outcome.trouble}")
        return outcome.error

    def first(self, shared: dict[str, int], store: Store) -> None:
        """Rank 0, in the order of training/loop.py."""
        run = self.run
        number = run.attempts.claim()
        try:
            base, _ = newest_to_resume(run.checkpoints)
        except UserError:  # there are checkpoints and none counts: only a user may start at step 0
            return
        complete = [path for path in list_checkpoints(run.checkpoints) if verify(path) is None]
        if complete and self.draw.random() < 0.3 and self.alone():
            base = self.draw.choice(complete)  # resume=PATH: later ones no longer count
        begin = self.begin(number, base)
        remove_unfinished(run.checkpoints, number, Disk())
        with run.records(number, True) as (events, lines):
            events.add("resumed" if begin else "started", begin)
            shared.update(number=number, step=begin)
            step = begin
            while step < STEPS:
                step += 1
                lines.append({"step": step, "by": number})
                if step % EVERY == 0:
                    if run.attempts.superseded(number):
                        return
                    error = self.save(number, step, 0, store)
                    events.add("checkpoint" if error is None else "checkpoint_failed", step)
                elif self.ranks == 1 and self.draw.random() < 0.05:
                    base, _ = newest(run.checkpoints, before=step)
                    if base is not None:
                        number, step = self.rewind(number, base)
                        if not number:
                            return
                        for record in (events, lines):
                            record.follow_attempt(run.attempts.directory(number) / record.path.name)

    def rewind(self, number: int, base: Path) -> tuple[int, int]:
        """An attempt goes back to a checkpoint, under the next number: (number, step); (0, 0): it is superseded."""
        try:
            claimed = self.run.attempts.claim(after=number)
        except Superseded:
            return 0, 0
        if claimed != number + 1:
            self.problems.append(f"attempt {number}, superseded by {claimed - 1}, has taken over as {claimed}")
        return claimed, self.begin(claimed, base)

    def alone(self) -> bool:
        """Whether no earlier attempt is alive, which could delete what the user of this one has chosen."""
        own = threading.current_thread().name.split(".")[0]
        return all(process.done or process.name.split(".")[0] == own for process in self.processes)

    def begin(self, number: int, base: Path | None) -> int:
        """Notes the start of an attempt from a checkpoint; returns its step."""
        name = None if base is None else CheckpointName.of(base)
        step = 0 if name is None else name.step
        self.run.attempts.begin(number, step, None if name is None else name.attempt)
        return step

    def other(self, shared: dict[str, int], store: Store, rank: int) -> None:
        """Another rank: its part of every save."""
        process = threading.current_thread()
        assert isinstance(process, Process)
        while not shared:
            process.point()
        for step in range(shared["step"] + 1, STEPS + 1):
            if step % EVERY == 0:
                self.save(shared["number"], step, rank, store)

    def wrong(self) -> str | None:
        """The first violated invariant; None: all hold."""
        run = self.run
        if self.problems:
            return self.problems[0]
        for file, who in self.writers.items():
            if len(who) > 1:
                return f"{file} was written by {sorted(who)}"
        for path in list_checkpoints(run.checkpoints):
            if (damage := verify(path)) is not None:
                return f"{path.name} counts and is damaged: {damage.reason}"
            for rank in range(self.ranks):
                part = path / f"part_{rank}.json"
                whose = json.loads(part.read_text()) if part.exists() else None
                name = CheckpointName.of(path)
                if whose != [name.attempt, name.step, rank]:
                    return f"{path.name} has for rank {rank} the part of {whose}"
        starts = run.attempts.starts()
        base, last = (starts[-1].step, starts[-1].number) if starts else (0, 0)
        found, _ = newest(run.checkpoints)
        if base and (found is None or CheckpointName.of(found).step < base):
            return f"the checkpoint of step {base}, from which the newest attempt continued, is gone"
        complete = [path for path in run.checkpoints.glob("step_*") if verify(path) is None]
        own = [name for path in complete if (name := CheckpointName.of(path)).attempt == last]
        if own and (found is None or CheckpointName.of(found) < max(own)):
            return f"{max(own)} of the newest attempt does not count"
        number = run.attempts.claim()
        step = self.begin(number, found)
        rows = [record.row for record in run.attempts.metrics()]
        if [row["step"] for row in rows] != list(range(1, step + 1)):
            return f"the rows before step {step} are {[row['step'] for row in rows]}"
        with run.records(number, True):
            shown = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        if shown != rows:
            return "metrics.jsonl is not the merge"
        return self.leftovers(number, step)

    def leftovers(self, number: int, step: int) -> str | None:
        """What a start and one save of an undisturbed attempt leave beside the checkpoints that are to be kept."""
        remove_unfinished(self.run.checkpoints, number, Disk())
        counted = [path.name for path in list_checkpoints(self.run.checkpoints)]
        store, last = Store(), step + EVERY
        for rank in reversed(range(self.ranks)):  # rank 0 comes last: it reads the others' messages
            if (error := self.save(number, last, rank, store)) is not None:
                return f"the save of step {last} failed: {error}"
        wanted = {"latest", *[*counted, str(CheckpointName(last, number))][-self.keep :]}
        found = {path.name for path in self.run.checkpoints.iterdir()}
        return None if found == wanted else f"checkpoints/ holds {sorted(found)}, not {sorted(wanted)}"


def play(folder: Path, seed: int) -> str | None:
    """Runs a schedule in a directory that is removed afterwards; returns what was wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    world = World(folder, seed, ranks=1 + seed % 3, attempts=2 + seed % 2)
    world.schedule()
    wrong = world.wrong()
    world.processes.clear()  # they reference the world, and with it open files
    shutil.rmtree(folder)
    return wrong
