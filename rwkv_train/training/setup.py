"""RunSetup: data, model and settled settings of a run, from a checked config; RunAttempt: one start of that run.

Making a RunSetup finds every error that needs the data, the weights or the devices, and writes nothing.
No Lightning here: it takes seconds to import.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

import rwkv_train
from rwkv_train.checkpoint.directory import list_checkpoints, newest, read_meta, refuse_damage, remove_unfinished
from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.shards import WEIGHT, Reader, StateShard
from rwkv_train.checkpoint.storage import Storage
from rwkv_train.cluster.rank_info import RankInfo
from rwkv_train.config import Config
from rwkv_train.config.clock import TokenClock
from rwkv_train.config.mesh import Mesh
from rwkv_train.config.schema import PLACEMENT, as_tree, differences
from rwkv_train.data.batches import Batches
from rwkv_train.data.sources import check_token_in_vocabulary
from rwkv_train.errors import UserError
from rwkv_train.models import LanguageModel, RecipeRow, build_model, recipe_of
from rwkv_train.models.weights import refuse_mismatches, shapes_of
from rwkv_train.planning.model import model_config
from rwkv_train.planning.resolved import ResolvedConfig, find_devices, resolve
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.rundir.history import History
from rwkv_train.rundir.jsonl import Events, JsonLines, WriteErrors
from rwkv_train.training.initial_weights import Recipe
from rwkv_train.training.optim import describe_frozen, describe_groups, parameter_groups
from rwkv_train.training.resume import clock_of, continue_data, is_same_data, skipped_samples


@dataclass(frozen=True)
class RunSetup:
    """What a run is made of, before it begins.

    Attributes:
        config: as the user asked for it; what is open in it (`auto`, None) is settled in `resolved`.
        resolved: what runs.
        tree: the config as config.yaml and checkpoints hold it.
        rank_info: of this process.
        console: prints on the first rank, and is quiet on the others.
        data: the batches of all ranks.
        model: without values, unless a single device trains it.
        recipe: each parameter's row, by name.
        shapes: of the parameters, by name.
        source: of the values that the model does not have yet: the recipe or a file; None: it has them.
        directory: of the run.
        storage: of the checkpoints; None: the local file system.
    """

    config: Config
    resolved: ResolvedConfig
    tree: dict[str, Any]
    rank_info: RankInfo
    console: Console
    data: Batches
    model: LanguageModel
    recipe: dict[str, RecipeRow]
    shapes: dict[str, tuple[int, ...]]
    source: Recipe | Reader | None
    directory: RunDirectory
    storage: Storage | None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes the run's records."""
        return self.rank_info.first

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def assemble(config: Config, storage: Storage | None = None, rank_info: RankInfo | None = None) -> RunSetup:
    """Settles what the config leaves open, reads the data and builds the model; writes nothing.

    With dry_run=true it is a run on devices that need not be present, and its model has no values.

    Raises:
        UserError: what shows only with the data, the weights or the devices at hand.
    """
    rank_info = rank_info or RankInfo()
    console = Console(quiet=not rank_info.first, highlight=False, soft_wrap=True)
    devices = find_devices(config)
    torch.set_num_threads(devices.threads)
    data = _read_data(config, devices.mesh)
    resolved = resolve(config, devices, data.vocabulary, data.split.samples, console)
    data.share_out(resolved.micro)
    model, source = _build(config, data.vocabulary, resolved.strategy == "single" and not config.dry_run)
    setup = RunSetup(
        config=config,
        resolved=resolved,
        tree=as_tree(devices.recorded(config)),
        rank_info=rank_info,
        console=console,
        data=data,
        model=model,
        recipe=recipe_of(model),
        shapes=shapes_of(dict(model.named_parameters())),
        source=source,
        directory=RunDirectory(config.run.root, config.run.name),
        storage=storage,
    )
    if config.resume not in ("auto", "never"):
        path = Path(config.resume).expanduser()
        refuse_damage(path, content=rank_info.first)
        check_checkpoint(path, setup)
    return setup


def _total_steps(config: Config, clock: TokenClock) -> int | None:
    budget = config.budget.total
    return None if budget is None else clock.steps(budget)


def _read_data(config: Config, mesh: Mesh) -> Batches:
    """Opens the data; refuses a budget or a vocabulary that they do not fit."""
    data = Batches(
        config.data,
        config.batch,
        config.seed,
        mesh,
        config.validation.batches,
        config.validation.context,
        config.vocab.extend,
        config.model.vocab_size,
    )
    if not config.run.allow_changes:  # else the checkpoint decides how far the data is read: open_attempt
        data.refuse_budget(_total_steps(config, clock_of(None, config.batch.tokens)))
    check_token_in_vocabulary(data.largest_token, data.vocabulary, f"data.path={config.data.path}")
    return data


def _build(config: Config, vocab_size: int, valued: bool) -> tuple[LanguageModel, Recipe | Reader | None]:
    """The model and where its first values come from: the recipe or init.weights; None where it has them already."""
    shape = model_config(config, vocab_size)
    model = build_model(shape, device="meta")
    source: Recipe | Reader
    if config.init_weights is None:
        if valued:
            model = build_model(shape, config.seed)
        source = Recipe(recipe_of(model), shapes_of(dict(model.named_parameters())), model.config, config.seed)
    else:
        source = Reader(Path(config.init_weights).expanduser())
        source.grow_vocabulary(len(config.vocab.extend))
        refuse_mismatches(f"init.weights={config.init_weights}", source.shapes, model)
        if valued:
            model = model.to_empty(device="cpu")
            source.fill(StateShard(WEIGHT, name, 0, p.detach().view(-1), True) for name, p in model.named_parameters())
    model.checkpoint_activations(int(config.activation_checkpointing))
    return model, None if valued else source


def check_checkpoint(path: Path, setup: RunSetup) -> None:
    """Refuses to resume from a checkpoint of another model, other data or another config.

    Raises:
        UserError: it lists what differs, unless run.allow_changes=true allows it.
    """
    meta = read_meta(path)
    refuse_mismatches(f"the checkpoint {path}", meta.shapes, setup.model)
    changes = _changes(meta, setup)
    placed = [change for change in changes if change.split(":")[0] in PLACEMENT]
    changed = [change for change in changes if change not in placed]
    if changed and not setup.config.run.allow_changes:
        raise UserError(
            f"the checkpoint {path} was made with another config: {'; '.join(changed)}",
            "to resume all the same: run.allow_changes=true; for a new run: run.name=NEW",
        )
    if placed or changed:
        setup.console.print(f"resumed with {'; '.join([*placed, *changed])}")


def _changes(meta: CheckpointMeta, setup: RunSetup) -> list[str]:
    """What differs from the run that a checkpoint was made by, each as "what: before → now"."""
    changes = differences(meta.config, setup.tree)
    if meta.data != setup.data.digest:
        changes.append(f"the data itself: content hash {meta.data} → {setup.data.digest}")
    tokenizer = setup.data.tokenizer.identity
    if meta.tokenizer != tokenizer:
        changes.append(f"the tokenizer: {meta.tokenizer} → {tokenizer}")
    return changes


def versions() -> dict[str, str]:
    """Of what computes: our package and a hash of its source, torch, Lightning. Checkpoints hold it."""
    code = hashlib.sha256()
    for path in sorted(Path(rwkv_train.__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    ours = {"rwkv_train": rwkv_train.__version__, "code": code.hexdigest()[:16]}
    return {**ours, "torch": torch.__version__, "lightning": version("lightning")}


def describe(setup: RunSetup, attempt: RunAttempt) -> None:
    """Prints the head of a run: what is trained on which data, how, and in which directory."""
    config, data, shape, say = setup.config, setup.data, setup.model.config, setup.console.print
    resolved = setup.resolved
    say(f"data    {data.description}")
    sizes = f"L{shape.n_layer} C{shape.n_embd} V{shape.vocab_size}"
    say(f"model   {shape.arch} {config.model.size}: {sizes}, {setup.parameters:,} parameters")
    groups = parameter_groups(setup.model, setup.recipe, config.optim.weight_decay, config.optim.rules)
    for line in [*describe_groups(groups), *describe_frozen(setup.model)]:
        say(f"group   {line}")
    say(
        f"batch   {config.batch.tokens:,} tokens a step: context {config.batch.context} × micro-batch {resolved.micro} "
        f"× {resolved.mesh.ranks} devices × {resolved.accumulation} passes, {resolved.threads} threads"
    )
    total, hours, checkpoint = attempt.total_steps, config.budget.hours, attempt.checkpoint
    budget = "no end" if total is None else f"{total:,} steps = {attempt.clock.tokens(total):,} tokens"
    say(f"budget  {budget}" + ("" if hours is None else f", at most {hours:g} h"))
    say(f"run     {setup.directory.path}" + ("" if checkpoint is None else f", resumed from {checkpoint}"))


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
        UserError: the checkpoint does not fit the config, the data ends before the budget, or no attempt can be
            claimed.
    """
    run, batch = setup.directory, setup.config.batch.tokens
    present = list_checkpoints(run.checkpoints, setup.storage)
    checkpoint, meta = _find_checkpoint(setup)
    step, total = 0 if meta is None else meta.step, _total_steps(setup.config, clock_of(meta, batch))
    if total is not None and step >= total:
        setup.console.print(
            f"{run.path} is finished: {step} of {total} steps.\n"
            "  budget.steps=MORE run.allow_changes=true continues it; run.name=NEW starts another run"
        )
        return None
    passed_over = run.read_passed_over()
    skips = skipped_samples(passed_over["skipped"], setup.data.context)
    continue_data(setup.data, meta, skips)
    setup.data.refuse_budget(total)
    history = History.read(run)
    number = run.claim_attempt() if setup.first else 0
    if list_checkpoints(run.checkpoints, setup.storage) != present:  # an older attempt has saved one
        checkpoint, meta = _find_checkpoint(setup)
        continue_data(setup.data, meta, skips)
    setup.data.end_before(total)
    if setup.first:
        _note_start(setup, number, checkpoint, meta, write_errors)
    clock, same_data = clock_of(meta, batch), meta is None or is_same_data(_changes(meta, setup))
    events, metrics = stack.enter_context(run.records(number, setup.first, clock.tokens))
    rewinds = passed_over["rewinds"]
    return RunAttempt(number, checkpoint, meta, history, events, metrics, rewinds, clock, total, same_data)


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
