"""The parts of a run, made from a checked config.

Making them finds every mistake that needs the data, the weights or the devices, and writes nothing. No Lightning here:
it takes seconds to import.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rwkv_train.checkpoint.directory import read_meta, refuse_damage
from rwkv_train.checkpoint.shards import WEIGHT, Reader, StateShard
from rwkv_train.checkpoint.storage import Storage
from rwkv_train.cluster.rank_info import RankInfo
from rwkv_train.config import Config
from rwkv_train.config.schema import PLACEMENT, as_tree, differences
from rwkv_train.data.batches import Batches
from rwkv_train.data.sources import refuse_large
from rwkv_train.errors import UserError
from rwkv_train.models import RWKV, ModelConfig, Row, build_model, recipe_of
from rwkv_train.models.weights import refuse_mismatches, shapes_of
from rwkv_train.planning.cards import card_of, cpu_card, present_card, ranks_of, with_precision
from rwkv_train.planning.plan import make_plan, smallest_change, why
from rwkv_train.planning.report import advice
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.training.initial_weights import Recipe

_SMALL = 0.05  # a model whose state takes less of the memory fits without a plan, which would take a second


@dataclass(frozen=True)
class RunSetup:
    """What a run is made of. Making them finds every mistake, and writes nothing."""

    config: Config
    tree: dict[str, Any]  # the config as config.yaml and checkpoints hold it
    rank_info: RankInfo  # of this process
    console: Console
    accelerator: str
    processes: int  # on this node
    strategy: str  # settled: single, or a name of conf/strategy but auto
    data: Batches
    model: RWKV  # without values unless a single device trains it
    recipe: dict[str, Row]
    shapes: dict[str, tuple[int, ...]]  # of the parameters
    source: Recipe | Reader | None  # of the values that the model does not have yet
    directory: RunDirectory
    storage: Storage | None

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank_info.first

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def total_steps(self) -> int | None:
        budget = self.config.budget.total
        return None if budget is None else budget.in_steps(self.config.batch.tokens)


def assemble(config: Config, storage: Storage | None = None, rank_info: RankInfo | None = None) -> RunSetup:
    """Makes the parts of a run; with dry_run=true, of one on devices that need not be here, without any weights.

    Raises:
        UserError: what `train` raises before it writes anything.
    """
    rank_info = rank_info or RankInfo()
    accelerator, processes = _simulated_devices(config) if config.dry_run else _devices(config)
    bfloat16 = accelerator == "gpu" and (config.dry_run or torch.cuda.is_bf16_supported(including_emulation=False))
    config = with_precision(config, bfloat16)
    torch.set_num_threads(config.threads or max(1, _cores() // (processes if accelerator == "cpu" else 1)))
    data = Batches(
        config.data,
        config.batch,
        config.seed,
        processes * config.trainer.machines,
        config.validation.batches,
        config.validation.context,
        config.vocab.extend,
    )
    budget = config.budget.total
    data.refuse_budget(None if budget is None else budget.in_steps(config.batch.tokens))
    data.vocabulary = config.model.vocab_size or data.vocab_size
    refuse_large(data.largest_token, data.vocabulary, f"data.path={config.data.path}")
    console = Console(quiet=not rank_info.first, highlight=False, soft_wrap=True)
    strategy, micro = _strategy(config, accelerator, processes, data, console)
    data.share_out(micro)
    model, source = _build(config, data.vocabulary, strategy == "single" and not config.dry_run)
    setup = RunSetup(
        config=config,
        tree=as_tree(config),
        rank_info=rank_info,
        console=console,
        accelerator=accelerator,
        processes=processes,
        strategy=strategy,
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


def _strategy(config: Config, accelerator: str, processes: int, data: Batches, console: Console) -> tuple[str, int]:
    """The strategy's name and the samples of a pass, with what is left open settled.

    Raises:
        UserError: the model does not fit into the devices' memory; says what would.
    """
    ranks, gpu = processes * config.trainer.machines, accelerator == "gpu"
    package = "deepspeed" if config.strategy.startswith("deepspeed") else "torch"
    if find_spec(package) is None:
        raise UserError(f"strategy={config.strategy} needs {package}, which is not installed", f"pip install {package}")
    card = card_of(config)[0] if config.dry_run else (present_card() if gpu else None) or cpu_card(processes)
    state = 16.0 * config.model.n_layer * config.model.n_embd**2 * 13
    if config.strategy == "auto" and state < _SMALL * card.memory:
        return "single" if ranks == 1 else "ddp", data.micro
    vocab_size = data.vocabulary or data.vocab_size
    plan = make_plan(config, card, ranks, vocab_size, gpu)
    if not plan.fits and not config.dry_run:
        change = smallest_change(config, plan, vocab_size)
        raise UserError(
            f"model={config.model.size} does not fit {ranks} × {card.name} with strategy={plan.layout.strategy}: "
            f"{plan.held / 1e9:.1f} GB a device, it has {card.memory / 1e9:.1f}",
            advice(change),
        )
    if config.strategy == "auto" and not config.dry_run:
        console.print(why(plan))
    return plan.layout.strategy, plan.layout.micro


def _simulated_devices(config: Config) -> tuple[str, int]:
    card, _ = card_of(config)
    return "cpu" if card.name == "cpu" else "gpu", ranks_of(config, card) // config.trainer.machines


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices(config: Config) -> tuple[str, int]:
    """The accelerator's name for Lightning and the number of processes on this node."""
    wanted, devices = config.trainer.accelerator, config.trainer.devices
    present = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not present):
        processes = 1 if devices == "auto" else int(devices)
        if processes > _cores():
            raise UserError(
                f"trainer.devices={processes}: this machine has {_cores()} CPU cores and no GPU that torch can use",
                f"trainer.devices={_cores()}",
            )
        return "cpu", processes
    processes = present if devices == "auto" else int(devices)
    if not present or processes > present:
        raise UserError(
            f"trainer.accelerator={wanted} trainer.devices={devices}: torch can use {present} GPUs here",
            f"trainer.devices={present}" if present else "trainer.accelerator=cpu",
        )
    if config.trainer.precision == "bf16-mixed" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"trainer.precision=bf16-mixed: {torch.cuda.get_device_name()} has no bfloat16", "trainer.precision=32-true"
        )
    return "gpu", processes


def _build(config: Config, vocab_size: int, valued: bool) -> tuple[RWKV, Recipe | Reader | None]:
    """The model and where its first values come from: the recipe or init.weights; None where it has them already."""
    settings = config.model
    shape = ModelConfig(config.arch, settings.n_layer, settings.n_embd, vocab_size, settings.dim_ffn)
    model = build_model(shape, device="meta")
    source: Recipe | Reader
    if config.init_weights is None:
        if valued:
            model = build_model(shape, config.seed)
        source = Recipe(recipe_of(model), shapes_of(dict(model.named_parameters())), shape.n_layer, config.seed)
    else:
        source = Reader(Path(config.init_weights).expanduser())
        source.grow_vocabulary(len(config.vocab.extend))
        refuse_mismatches(f"init.weights={config.init_weights}", source.shapes, model)
        if valued:
            model = model.to_empty(device="cpu")
            source.fill(StateShard(WEIGHT, name, 0, p.detach().view(-1), True) for name, p in model.named_parameters())
    model.activation_checkpointing = int(config.activation_checkpointing)
    return model, None if valued else source


def check_checkpoint(path: Path, setup: RunSetup) -> None:
    """Refuses to go on from a checkpoint of another model, other data or another config."""
    meta = read_meta(path)
    refuse_mismatches(f"the checkpoint {path}", meta.shapes, setup.model)
    changed = differences(meta.config, setup.tree)
    placed = [change for change in changed if change.split(":")[0] in PLACEMENT]
    changed = [change for change in changed if change not in placed]
    if meta.data != setup.data.digest:
        changed.append(f"the data itself: content hash {meta.data} → {setup.data.digest}")
    tokenizer = setup.data.tokenizer.identity
    if meta.tokenizer != tokenizer:
        changed.append(f"the tokenizer: {meta.tokenizer} → {tokenizer}")
    if changed and not setup.config.run.allow_changes:
        raise UserError(
            f"the checkpoint {path} was made with another config: {'; '.join(changed)}",
            "go on all the same: run.allow_changes=true; a new run: run.name=NEW",
        )
    if placed or changed:
        setup.console.print(f"resumed with {'; '.join([*placed, *changed])}")
