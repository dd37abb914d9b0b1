"""RunSetup: data, model and settled settings of a run, from a checked config.

Making a RunSetup finds every error that needs the data, the weights or the devices, and writes nothing.
No Lightning here: it takes seconds to import.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import rwkv_train
from rwkv_train.checkpoint.shards import WEIGHT, Reader, StateShard
from rwkv_train.checkpoint.storage import Storage
from rwkv_train.cluster.rank_info import RankInfo
from rwkv_train.config import Config
from rwkv_train.config.clock import TokenClock
from rwkv_train.config.mesh import Mesh
from rwkv_train.config.schema import as_tree
from rwkv_train.console import make_console
from rwkv_train.data.batches import Batches
from rwkv_train.data.learned import LearnedTokenizer, read_learned
from rwkv_train.data.sources import check_token_in_vocabulary
from rwkv_train.models import LanguageModel, RecipeRow, build_model, recipe_of
from rwkv_train.models.registry import learning_rate_note
from rwkv_train.models.weights import refuse_mismatches, shapes_of
from rwkv_train.planning.model import model_config
from rwkv_train.planning.resolved import ResolvedConfig, find_devices, resolve
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.training.initial_weights import Recipe
from rwkv_train.training.optim import describe_frozen, describe_groups, parameter_groups
from rwkv_train.user_path import user_path

if TYPE_CHECKING:
    from rwkv_train.training.attempt import RunAttempt


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
    console = make_console(quiet=not rank_info.first)
    devices = find_devices(config)
    torch.set_num_threads(devices.threads)
    directory = RunDirectory(config.run.root, config.run.name)
    learned = None if config.resume == "never" else read_learned(config.data.tokenizer, directory.tokenizer)
    data = _read_data(config, devices.mesh, learned)
    resolved = resolve(config, devices, data.vocabulary, data.split.samples, console)
    data.share_out(resolved.micro)
    model, source = _build(config, data.vocabulary, resolved.strategy == "single" and not config.dry_run, console)
    return RunSetup(
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
        directory=directory,
        storage=storage,
    )


def total_steps(config: Config, clock: TokenClock) -> int | None:
    """Optimiser steps of the budget; None: no limit."""
    budget = config.budget.total
    return None if budget is None else clock.steps(budget)


def _read_data(config: Config, mesh: Mesh, learned: LearnedTokenizer | None) -> Batches:
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
        learned,
    )
    if not config.run.allow_changes:  # else the checkpoint decides how far the data is read: open_attempt
        data.refuse_budget(total_steps(config, TokenClock.resumed((), 0, config.batch.tokens)))
    check_token_in_vocabulary(data.largest_token, data.vocabulary, f"data.path={config.data.path}")
    return data


def _build(
    config: Config, vocab_size: int, valued: bool, console: Console
) -> tuple[LanguageModel, Recipe | Reader | None]:
    """The model and where its first values come from: the recipe or init.weights; None where it has them already."""
    shape = model_config(config, vocab_size)
    model = build_model(shape, device="meta")
    source: Recipe | Reader
    if config.init_weights is None:
        if valued:
            model = build_model(shape, config.seed)
        source = Recipe(recipe_of(model), shapes_of(dict(model.named_parameters())), model.config, config.seed)
    else:
        source = Reader(user_path(config.init_weights), finite=True)
        if source.note:
            console.print(f"weights {source.note}")
        source.grow_vocabulary(len(config.vocab.extend))
        refuse_mismatches(f"init.weights={config.init_weights}", source.shapes, model)
        if valued:
            model = model.to_empty(device="cpu")
            source.fill(StateShard(WEIGHT, name, 0, p.detach().view(-1), True) for name, p in model.named_parameters())
    model.checkpoint_activations(int(config.activation_checkpointing))
    return model, None if valued else source


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
    if note := learning_rate_note(shape, config.optim.lr, config.optim.final_lr):
        say(note)
    say(
        f"batch   {config.batch.tokens:,} tokens a step: context {config.batch.context} × micro-batch {resolved.micro} "
        f"× {resolved.mesh.ranks} devices × {resolved.accumulation} passes, {resolved.threads} threads"
    )
    total, hours, checkpoint = attempt.total_steps, config.budget.hours, attempt.checkpoint
    budget = "no end" if total is None else f"{total:,} steps = {attempt.clock.tokens(total):,} tokens"
    say(f"budget  {budget}" + ("" if hours is None else f", at most {hours:g} h"))
    say(f"run     {setup.directory.path}" + ("" if checkpoint is None else f", resumed from {checkpoint}"))
