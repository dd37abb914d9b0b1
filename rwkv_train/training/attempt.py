"""RunAttempt: one start of a run, from the checkpoint that it resumes from and what has changed since.

No Lightning here: it takes seconds to import.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml

from rwkv_train.checkpoint.directory import (
    WITHOUT_FINITE_LOSS,
    list_checkpoints,
    newest_to_resume,
    refuse_damage,
    remove_unfinished,
)
from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.retention import Retention
from rwkv_train.checkpoint.storage import LocalStorage
from rwkv_train.cluster.agreement import decided_by_first
from rwkv_train.config import Config
from rwkv_train.config.clock import TokenClock
from rwkv_train.config.schema import PLACEMENT, differences, from_tree
from rwkv_train.console import ERROR_STYLE
from rwkv_train.data.batches import Batches
from rwkv_train.data.course import Course
from rwkv_train.data.learned import learned_of
from rwkv_train.errors import UserError
from rwkv_train.models.weights import refuse_mismatches
from rwkv_train.rundir.crash_file import take_crashes
from rwkv_train.rundir.history import History, StartHistory
from rwkv_train.rundir.jsonl import Events, JsonLines, WriteErrors
from rwkv_train.training.optim import learning_rate
from rwkv_train.training.setup import RunSetup, total_steps
from rwkv_train.user_path import user_path

_DATA_CHANGES = ("data.", "vocab.", "seed:", "batch.context:", "the data itself:", "the tokenizer:")


@dataclass(frozen=True)
class RunAttempt:
    """One start of a run, from its claim of a number on.

    Attributes:
        number: of the attempt, from 1; 0 on a rank that rank 0 has started itself, which gets the number later.
        checkpoint: to resume from; None: the run begins at step 0.
        meta: of the checkpoint; None: there is none.
        history: of the attempts before; empty on ranks but the first.
        events, metrics: the records that this attempt writes.
        rewinds: how often the run was rewound so far.
        clock: tokens trained on after each step.
        total_steps: optimiser steps of the budget; None: no limit.
        same_data: whether the checkpoint was made with the same data in the same order.
    """

    number: int
    checkpoint: Path | None
    meta: CheckpointMeta | None
    history: History
    events: Events
    metrics: JsonLines
    rewinds: int
    clock: TokenClock
    total_steps: int | None
    same_data: bool

    @property
    def step(self) -> int:
        """The step that the attempt begins after."""
        return 0 if self.meta is None else self.meta.step


def open_attempt(setup: RunSetup, write_errors: WriteErrors, stack: ExitStack) -> RunAttempt | None:
    """Claims the next attempt of a run whose directory this process holds, opens its records, and sets the data.

    Args:
        setup: of the run.
        write_errors: counts what the disk refuses.
        stack: closes the records.

    Returns:
        None where the run is finished already, which is printed.

    Raises:
        UserError: the checkpoint does not fit the config, no checkpoint of the run can be used, the data ends before
            the budget, or no attempt can be claimed. Of ranks that were started together rank 0 raises it, and the
            others SystemExit.
    """
    run, batch = setup.directory, setup.config.batch.tokens
    found = decided_by_first(setup.rank_info, lambda: _find_checkpoint(setup))
    total = total_steps(setup.config, clock_of(found.meta, batch))
    if total is not None and found.step >= total and setup.rank_info.parent is None:
        setup.console.print(
            f"{run.path} is finished: {found.step} of {total} steps.\n"
            "  budget.steps=MORE run.allow_changes=true continues it; run.name=NEW starts another run"
        )
        return None
    passed_over = run.read_passed_over()
    skips = skipped_samples(passed_over.skipped, setup.data.context)
    continue_data(setup.data, found.meta, skips)
    setup.data.refuse_budget(total)
    history = StartHistory(run) if setup.first else History([], [])
    number, found = decided_by_first(setup.rank_info, lambda: _claim(setup, found, write_errors))
    meta, clock = found.meta, clock_of(found.meta, batch)
    continue_data(setup.data, meta, skips)
    total = total_steps(setup.config, clock)
    setup.data.end_before(total)
    same_data = meta is None or is_same_data(_changes(meta, setup))
    events, metrics = stack.enter_context(run.records(number, setup.first, clock.tokens))
    if setup.first:
        for note in (*([passed_over.note] if passed_over.note else []), *run.attempts.left_out.texts()):
            setup.console.print(f"WARNING: {note}", style=ERROR_STYLE)
        _report_crashes(setup, events, number, 0 if meta is None else meta.step)
    rewinds = passed_over.rewinds
    return RunAttempt(number, found.checkpoint, meta, history, events, metrics, rewinds, clock, total, same_data)


def _report_crashes(setup: RunSetup, events: Events, number: int, step: int) -> None:
    for crash in take_crashes(setup.directory.logs, number):
        events.add("crashed", step, rank=crash.rank, reason=crash.reason, file=crash.file.name)
        what = f"rank {crash.rank} of the start before crashed: {crash.reason}"
        setup.console.print(f"WARNING: {what}; its stacks are in {crash.file}", style=ERROR_STYLE)


def _claim(setup: RunSetup, found: _Found, write_errors: WriteErrors) -> tuple[int, _Found]:
    """The number of this attempt and the checkpoint that it resumes from; ranks but the first claim none."""
    run = setup.directory
    if not setup.first:
        return 0, found
    number = run.claim_attempt()
    if tuple(list_checkpoints(run.checkpoints, setup.storage)) != found.present:  # an older attempt has saved one
        found = _find_checkpoint(setup)
    _note_start(setup, number, found.checkpoint, found.meta, write_errors)
    return number, found


def _note_start(
    setup: RunSetup, number: int, checkpoint: Path | None, meta: CheckpointMeta | None, write_errors: WriteErrors
) -> None:
    """Writes what the attempt resumes from, before everything else of it, config.yaml and a learnt tokenizer."""
    run = setup.directory
    own = checkpoint is not None and checkpoint.absolute().parent == run.checkpoints.absolute()
    name = CheckpointName.parse(checkpoint.name) if checkpoint is not None and own else None
    run.attempts.begin(number, 0 if meta is None else meta.step, None if name is None else name.attempt)
    remove_unfinished(run.checkpoints, number, setup.storage)
    settings, storage = setup.config.checkpoint, setup.storage or LocalStorage()
    retention = Retention.of(run.checkpoints, run.attempts, settings, storage)
    if outdated := retention.outdated(number):
        names = ", ".join(path.name for path in outdated)
        setup.console.print(f"checkpoints that no longer count, deleted after the next save: {names}")
    with write_errors.tolerate(run.config), run.atomic_write(run.config) as path:
        path.write_text(yaml.safe_dump(setup.tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if (learned := learned_of(setup.data.tokenizer)) is not None:
        with write_errors.tolerate(run.tokenizer), run.atomic_write(run.tokenizer) as path:
            path.write_bytes(learned.content)


@dataclass(frozen=True)
class _Found:
    """The checkpoint to resume from.

    Attributes:
        checkpoint: its directory; None: the run begins at step 0.
        meta: of the checkpoint; None: there is none.
        present: the checkpoints of the run when it was looked for.
    """

    checkpoint: Path | None = None
    meta: CheckpointMeta | None = None
    present: tuple[Path, ...] = ()

    @property
    def step(self) -> int:
        return 0 if self.meta is None else self.meta.step


def _find_checkpoint(setup: RunSetup) -> _Found:
    """The checkpoint to resume from; prints the damaged ones that it passes over."""
    config, directory = setup.config, setup.directory.checkpoints
    present = tuple(list_checkpoints(directory, setup.storage))
    if config.resume == "never":
        return _Found(present=present)
    if config.resume != "auto":
        path = user_path(config.resume)
        return _found(path, present, setup)
    found, damaged = newest_to_resume(directory, setup.storage, content=setup.first)
    for damage in damaged:
        setup.console.print(f"damaged checkpoint skipped: {damage.path}: {damage.reason}", style=ERROR_STYLE)
    if found is not None:
        return _found(found, present, setup)
    if config.resume_typed:
        setup.console.print(f"resume=auto: nothing to resume in {directory}; the run starts at step 0")
    return _Found(present=present)


def _found(path: Path, present: tuple[Path, ...], setup: RunSetup) -> _Found:
    if changed := changes_since(path, setup):
        setup.console.print(f"resumed with {'; '.join(changed)}")
    meta = CheckpointMeta.read(path)
    if note := rate_change(meta, setup.config):
        setup.console.print(note)
    return _Found(path, meta, present)


def rate_change(meta: CheckpointMeta, config: Config) -> str:
    """What a changed budget, batch or schedule does to the learning rate where a run resumes; empty if nothing."""
    try:
        before = from_tree(meta.config)
    except UserError:  # of another version
        return ""
    clocks = TokenClock(tuple((step, tokens) for step, tokens in meta.batches)), clock_of(meta, config.batch.tokens)
    rates = [next_rate(each, clock, meta.step) for each, clock in zip((before, config), clocks, strict=True)]
    if math.isclose(*rates, rel_tol=1e-6):
        return ""
    what = f"under the former budget and schedule, {rates[1]:.3g} under these"
    return f"learning rate after step {meta.step:,}: {rates[0]:.3g} {what}"


def next_rate(config: Config, clock: TokenClock, step: int) -> float:
    """The base learning rate of the step after this one."""
    total = total_steps(config, clock)
    last = None if total is None else clock.tokens(total - 1)
    return learning_rate(config.optim, clock.tokens(step), last, clock.first_batch)


def checkpoint_to_resume(setup: RunSetup) -> tuple[Path | None, list[str]]:
    """The checkpoint that a start resumes from, and what has changed since; its content is hashed at the start only.

    Raises:
        UserError: the checkpoint that the user has named is damaged, or see `newest_to_resume` and `changes_since`.
    """
    resume = setup.config.resume
    if resume == "never":
        return None, []
    if resume == "auto":
        path, _ = newest_to_resume(setup.directory.checkpoints, setup.storage, content=False)
        return path, [] if path is None else changes_since(path, setup)
    path = user_path(resume)
    refuse_damage(path, content=setup.first)
    return path, changes_since(path, setup)


def changes_since(path: Path, setup: RunSetup) -> list[str]:
    """What differs between a run and the one that has written a checkpoint, and does not keep it from resuming there.

    Raises:
        UserError: a checkpoint whose weights give no finite loss, one of another model, or of another config or other
            data where run.allow_changes=true does not allow it; it lists what differs.
    """
    meta = CheckpointMeta.read(path)  # its files were compared with the manifest before
    if meta.probe is None:
        raise UserError(f"the checkpoint {path} cannot be resumed from: {WITHOUT_FINITE_LOSS}", "use an older one")
    refuse_mismatches(f"the checkpoint {path}", meta.shapes, setup.model)
    changes = _changes(meta, setup)
    placed = [change for change in changes if change.split(":")[0] in PLACEMENT]
    changed = [change for change in changes if change not in placed]
    if changed and not setup.config.run.allow_changes:
        raise UserError(
            f"the checkpoint {path} was made with another config: {'; '.join(changed)}",
            "to resume all the same: run.allow_changes=true; for a new run: run.name=NEW",
        )
    return [*placed, *changed]


def _changes(meta: CheckpointMeta, setup: RunSetup) -> list[str]:
    """What differs from the run that a checkpoint was made by, each as "what: before → now"."""
    changes = differences(meta.config, setup.tree)
    if meta.data != setup.data.digest:
        changes.append(f"the data itself: content hash {meta.data} → {setup.data.digest}")
    tokenizer = setup.data.tokenizer.identity
    if meta.tokenizer != tokenizer:
        changes.append(f"the tokenizer: {meta.tokenizer} → {tokenizer}")
    return changes


def clock_of(meta: CheckpointMeta | None, tokens_per_step: int) -> TokenClock:
    """The clock of a run that resumes from a checkpoint, or begins, with a batch of so many tokens."""
    if meta is None:
        return TokenClock.resumed((), 0, tokens_per_step)
    return TokenClock.resumed(meta.batches, meta.step, tokens_per_step)


def continue_data(data: Batches, meta: CheckpointMeta | None, skips: Sequence[tuple[int, int]]) -> None:
    """Makes the data continue after what a checkpoint has read; at the beginning where there is none.

    Another batch continues with the very next sample. Under another context, seed, share held out or other data, the
    order of the samples is another one; it continues after as many tokens of it.

    Args:
        data: of the run.
        meta: of the checkpoint.
        skips: (first, end) of ranges of samples that are passed over.
    """
    each, skips = data.split.samples, tuple(skips)
    if meta is None:
        data.begin(0, None, Course(0, 0, each, skips))
        return
    same = (meta.data, meta.tokenizer) == (data.digest, data.tokenizer.identity)
    course = Course(meta.step, -(-meta.data_tokens // data.context), each, skips)
    data.begin(meta.step, meta.position if same else None, course, meta.tokens_by_source)
    data.round_stages(meta.batches[0][1])


def skipped_samples(skipped: Iterable[Sequence[int]], context: int) -> tuple[tuple[int, int], ...]:
    """The ranges (first, end) of samples that contain the ranges (first token, tokens) of the data's order."""
    return tuple((first // context, -(-(first + tokens) // context)) for first, tokens in skipped)


def is_same_data(changes: Iterable[str]) -> bool:
    """Whether a sample's number still means the same sample after these changes ("setting: before → after")."""
    return not any(change.startswith(_DATA_CHANGES) for change in changes)
