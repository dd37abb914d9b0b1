"""The beginning of an attempt: its number, the checkpoint that it resumes from, and the records that it writes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml

from rwkv_train.checkpoint.directory import list_checkpoints, newest, read_meta, remove_unfinished
from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.rundir.history import History
from rwkv_train.rundir.jsonl import Events, JsonLines, WriteErrors
from rwkv_train.training.callbacks.bad_steps import read_passed_over
from rwkv_train.training.setup import RunSetup, check_checkpoint


@dataclass(frozen=True)
class RunAttempt:
    """One start of a run, from its claim of a number on.

    Attributes:
        number: of the attempt, from 1; 0 on ranks but the first, whose number they take over when they know each other.
        checkpoint: to resume from; None: the run begins at step 0.
        meta: of the checkpoint; None: there is none.
        history: of the attempts before.
        events, metrics: the records that this attempt writes.
        rewinds: how often the run was rewound so far.
        skips: (step, steps of data) pairs that the run passes over.
    """

    number: int
    checkpoint: Path | None
    meta: CheckpointMeta | None
    history: History
    events: Events
    metrics: JsonLines
    rewinds: int
    skips: list[tuple[int, int]]

    @property
    def step(self) -> int:
        """The step that the attempt begins after."""
        return 0 if self.meta is None else self.meta.step


def open_attempt(setup: RunSetup, write_errors: WriteErrors, stack: ExitStack) -> RunAttempt | None:
    """Claims the next attempt of a run whose directory this process holds, and opens its records.

    Args:
        setup: of the run.
        write_errors: counts what the disk refuses.
        stack: closes the records.

    Returns:
        None where the run is finished already, which is printed.

    Raises:
        UserError: the checkpoint does not fit the config, or no attempt can be claimed.
    """
    run, total = setup.directory, setup.total_steps
    present = list_checkpoints(run.checkpoints, setup.storage)
    checkpoint, meta = _find_checkpoint(setup)
    step = 0 if meta is None else meta.step
    if total is not None and step >= total:
        setup.console.print(
            f"{run.path} is finished: {step} of {total} steps.\n"
            "  budget.steps=MORE run.allow_changes=true continues it; run.name=NEW starts another run"
        )
        return None
    history = History.read(run)
    number = run.claim_attempt() if setup.first else 0
    if list_checkpoints(run.checkpoints, setup.storage) != present:  # an older attempt has saved one
        checkpoint, meta = _find_checkpoint(setup)
    if setup.first:
        _note_start(setup, number, checkpoint, meta, write_errors)
    events, metrics = stack.enter_context(run.records(number, setup.first, setup.config.batch.tokens))
    passed_over = read_passed_over(run)
    skips = [(first, steps) for first, steps in passed_over["skips"] or (() if meta is None else meta.skips)]
    return RunAttempt(number, checkpoint, meta, history, events, metrics, passed_over["rewinds"], skips)


def _note_start(
    setup: RunSetup, number: int, checkpoint: Path | None, meta: CheckpointMeta | None, write_errors: WriteErrors
) -> None:
    """Writes what the attempt resumes from, before everything else of it, and config.yaml."""
    run = setup.directory
    own = checkpoint is not None and checkpoint.absolute().parent == run.checkpoints.absolute()
    name = CheckpointName.parse(checkpoint.name) if checkpoint is not None and own else None
    run.attempts.begin(number, 0 if meta is None else meta.step, None if name is None else name.attempt)
    remove_unfinished(run.checkpoints, number, setup.storage)
    with write_errors.tolerate(run.config), run.atomic_write(run.config) as path:
        path.write_text(yaml.safe_dump(setup.tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _find_checkpoint(setup: RunSetup) -> tuple[Path | None, CheckpointMeta | None]:
    """The checkpoint to resume from and its meta; prints the damaged ones that it passes over."""
    config = setup.config
    if config.resume == "never":
        return None, None
    if config.resume != "auto":
        path = Path(config.resume).expanduser()
        return path, read_meta(path)
    directory = setup.directory.checkpoints
    found, damaged = newest(directory, setup.storage, content=setup.first)
    for damage in damaged:
        setup.console.print(f"[bold red]damaged checkpoint passed over[/bold red]: {damage.path}: {damage.reason}")
    if found is not None:
        check_checkpoint(found, setup)
        return found, read_meta(found)
    if config.resume_typed:
        setup.console.print(f"resume=auto: nothing to resume in {directory}; the run starts at step 0")
    return None, None
