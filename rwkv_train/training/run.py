"""From a checked config to a trained model: the one file that knows all rooms."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, Timer
from rich.console import Console

import rwkv_train
from rwkv_train.config import Config
from rwkv_train.data.datamodule import DataModule
from rwkv_train.errors import UserError
from rwkv_train.evaluation.baselines import baselines
from rwkv_train.models import RWKV, ModelConfig, build_model
from rwkv_train.models.weights import load_weights, mismatches
from rwkv_train.training.callbacks.checkpointing import Checkpointing
from rwkv_train.training.callbacks.metrics import Metrics
from rwkv_train.training.callbacks.progress import ProgressBar
from rwkv_train.training.checkpoint import (
    DirectoryCheckpointIO,
    Storage,
    newest,
    read_meta,
    remove_unfinished,
    set_aside_newer,
)
from rwkv_train.training.directory import RunDirectory
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.optim import describe_groups
from rwkv_train.training.outcome import summarise, write_sample, write_weights
from rwkv_train.training.records import Events, JsonLines
from rwkv_train.training.strategy import build_strategy
from rwkv_train.training.throughput import keep_freed_memory
from rwkv_train.words import differences, as_tree

DISK_REFUSED = 3  # exit code of a run that came to its end, but could not write all its checkpoints or records


def train(config: Config, storage: Storage | None = None) -> int:
    """Trains as the config says; goes on where a run of that name was left.

    Args:
        config: settled and checked.
        storage: of the checkpoints; None: the local file system.

    Returns:
        the exit code: 0, or 3 where the disk refused a checkpoint or a record.

    Raises:
        UserError: what shows only with the data, the devices or the checkpoint at hand. Nothing was written then.
    """
    first = not rank_zero_only.rank  # None and 0 alike: this process speaks and writes
    console = Console(quiet=not first, highlight=False, soft_wrap=True)
    accelerator, processes = _devices(config)
    _tune(config.threads, processes if accelerator == "cpu" else 1)
    world = processes * config.trainer.num_nodes
    data = DataModule(config.data, config.batch, config.seed, world, config.validation.batches)
    model = _build(config, data.vocab_size)

    run = RunDirectory(config.run.root, config.run.name)
    tree = as_tree(config)
    if config.resume not in ("auto", "never"):
        _check_checkpoint(Path(config.resume), config, tree, model, data.digest)
    with run.claimed(first):
        return _train_in(run, config, tree, accelerator, processes, data, model, first, console, storage)


def _train_in(
    run: RunDirectory,
    config: Config,
    tree: dict[str, Any],
    accelerator: str,
    processes: int,
    data: DataModule,
    model: RWKV,
    first: bool,
    console: Console,
    storage: Storage | None,
) -> int:
    """The run itself, once its directory is ours."""
    checkpoint = _find_checkpoint(run, config, console)
    if checkpoint is not None and config.resume == "auto":
        _check_checkpoint(checkpoint, config, tree, model, data.digest)
    step = 0 if checkpoint is None else int(read_meta(checkpoint)["step"])
    total = None if config.budget.total is None else config.budget.total.in_steps(config.batch.tokens)
    if total is not None and step >= total:
        console.print(f"{run.path} is finished: {step} of {total} steps. A larger budget goes on, run.name=NEW starts anew.")
        return 0

    events, lines = Events(run.events, first), JsonLines(run.metrics, first)
    if first:
        remove_unfinished(run.checkpoints, storage)
        set_aside_newer(run.checkpoints, step)
        run.config.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    lines.cut(step)
    events.add("started" if checkpoint is None else "resumed", step)
    data.start_step = step

    module = RWKVModule(model, config.optim, total, config.batch.tokens, config.compile)
    metrics = Metrics(lines, data.bytes_per_token)
    saving = Checkpointing(
        run.checkpoints,
        config.checkpoint.every.in_steps(config.batch.tokens),
        config.checkpoint.keep,
        {"config": tree, "data": data.digest, "versions": _versions()},
        events,
        storage,
    )
    callbacks: list[Callback] = [metrics, saving, ProgressBar(metrics, total, console)]
    if config.budget.hours is not None:
        callbacks.append(Timer(timedelta(hours=config.budget.hours), verbose=False))
    _describe(console, config, data, module, run, checkpoint, total)
    if checkpoint is None and first:
        write_sample(model, data.tokenizer, config.samples, config.seed, 0, run)
    trainer = _trainer(config, accelerator, processes, total, data, callbacks, run, storage)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit:
        if not trainer.interrupted:
            raise
        console.print(f"\ninterrupted at step {trainer.global_step}; the same command goes on from the last checkpoint")
        return 130
    return _finish(config, trainer, module, data, run, events, console, saving.failures + lines.lost)


def _finish(
    config: Config,
    trainer: L.Trainer,
    module: RWKVModule,
    data: DataModule,
    run: RunDirectory,
    events: Events,
    console: Console,
    refused: int,
) -> int:
    """After the last step: final weights, samples, curve and summary, on the first rank."""
    if not trainer.is_global_zero:
        return 0
    events.add("finished" if trainer.global_step == module.total_steps else "stopped", trainer.global_step)
    refused += events.lost
    try:
        write_weights(module.model, run)
        write_sample(module.model, data.tokenizer, config.samples, config.seed, trainer.global_step, run)
        known = baselines(data.train.tokens, data.held_out.tokens) if len(data.held_out) and data.tokenizer.name == "bytes" else {}
        title = f"{run.path.name}: {sum(p.numel() for p in module.model.parameters()):,} parameters"
        summarise(console, run, title, (module.total_steps or 0) * config.batch.tokens, known)
    except OSError as error:
        console.print(f"[bold red]WARNING[/bold red]: {error.filename} could not be written: {error.strerror}")
        refused += 1
    if refused:
        kept, _ = newest(run.checkpoints)
        console.print(f"[bold red]WARNING[/bold red]: the disk refused {refused} writes; the last whole checkpoint is {kept}")
        return DISK_REFUSED
    return 0


def _devices(config: Config) -> tuple[str, int]:
    """The accelerator's name for Lightning and the number of processes on this node."""
    wanted, devices = config.trainer.accelerator, config.trainer.devices
    present = torch.cuda.device_count()
    accelerator = wanted if wanted != "auto" else ("gpu" if present else "cpu")
    if accelerator == "cpu":
        processes = 1 if devices == "auto" else int(devices)
        there = os.cpu_count() or 1
        if processes > there:
            raise UserError(f"trainer.devices={processes}: this machine has {there} CPU cores", f"trainer.devices={there}")
        return "cpu", processes
    processes = present if devices == "auto" else int(devices)
    if not present or processes > present:
        raise UserError(
            f"trainer.accelerator={wanted} trainer.devices={devices}: this machine has {present} GPUs that torch can use",
            f"trainer.devices={present}" if present else "trainer.accelerator=cpu",
        )
    if config.trainer.precision == "bf16-mixed" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"trainer.precision=bf16-mixed: {torch.cuda.get_device_name()} has no bfloat16", "trainer.precision=32-true")
    return "gpu", processes


def _tune(threads: int | None, processes: int) -> None:
    """Shares the cores among the processes of this machine."""
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // processes))
    keep_freed_memory()


def _build(config: Config, vocab_size: int) -> RWKV:
    """The model with its first weights: the recipe's, or those of init.weights."""
    settings = config.model
    shape = ModelConfig(
        config.arch, settings.n_layer, settings.n_embd, settings.vocab_size or vocab_size, settings.dim_ffn
    )
    if shape.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={shape.vocab_size} is smaller than the {vocab_size} tokens of the data's tokenizer",
            f"model.vocab_size={vocab_size}, or leave it out",
        )
    if config.init_weights is None:
        model = build_model(shape, config.seed)
    else:
        path = Path(config.init_weights)
        weights = load_weights(path)
        model = build_model(shape, device="meta").to_empty(device="cpu")
        _refuse(f"init.weights={path}", mismatches(weights, model))
        model.load_state_dict(weights)
    model.activation_checkpointing = config.activation_checkpointing
    return model


def _refuse(what: str, different: list[str]) -> None:
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(f"{what} does not fit the model: {'; '.join(different[:3])}{more}", "give the model's own shape")


def _check_checkpoint(path: Path, config: Config, tree: dict[str, Any], model: RWKV, digest: str) -> None:
    """Refuses to go on from a checkpoint of another model, other data or another config."""
    meta = read_meta(path)
    _refuse(f"the checkpoint {path}", mismatches(load_weights(path), model))
    changed = differences(meta["config"], tree)
    if meta["data"] != digest:
        changed.append(f"the data itself: content hash {meta['data']} → {digest}")
    if changed and not config.run.allow_changes:
        raise UserError(
            f"the checkpoint {path} was made with another config: {'; '.join(changed)}",
            "go on all the same: run.allow_changes=true; a new run: run.name=NEW",
        )


def _find_checkpoint(run: RunDirectory, config: Config, console: Console) -> Path | None:
    """What to resume from; names damaged checkpoints that are passed over."""
    if config.resume == "never":
        return None
    if config.resume != "auto":
        return Path(config.resume)
    found, damaged = newest(run.checkpoints)
    for damage in damaged:
        console.print(f"[bold red]damaged checkpoint passed over[/bold red]: {damage.path}: {damage.reason}")
    if found is None:
        console.print("resume=auto: nothing to resume; the run starts at step 0")
    return found


def _trainer(
    config: Config,
    accelerator: str,
    processes: int,
    total: int | None,
    data: DataModule,
    callbacks: list[Callback],
    run: RunDirectory,
    storage: Storage | None,
) -> L.Trainer:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # batches are cut from memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning's own use of torch
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    world = processes * config.trainer.num_nodes
    return L.Trainer(
        accelerator=accelerator,
        devices=processes,
        num_nodes=config.trainer.num_nodes,
        precision=config.trainer.precision,  # type: ignore[arg-type]
        strategy=build_strategy(config.strategy, accelerator, world),
        max_steps=-1 if total is None else total,
        max_epochs=-1,
        accumulate_grad_batches=data.accumulation,
        val_check_interval=config.validation.every.in_steps(config.batch.tokens) * data.accumulation,
        check_val_every_n_epoch=None,
        limit_val_batches=None if len(data.held_out) else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        plugins=[DirectoryCheckpointIO(storage)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.path,
    )


def _versions() -> dict[str, str]:
    return {"rwkv_train": rwkv_train.__version__, "torch": torch.__version__, "lightning": L.__version__}


def _describe(
    console: Console,
    config: Config,
    data: DataModule,
    module: RWKVModule,
    run: RunDirectory,
    checkpoint: Path | None,
    total: int | None,
) -> None:
    shape = module.model.config
    parameters = sum(p.numel() for p in module.model.parameters())
    console.print(f"data    {data.description}")
    console.print(
        f"model   {shape.arch} {config.model.size}: L{shape.n_layer} C{shape.n_embd} V{shape.vocab_size}, {parameters:,} parameters"
    )
    for line in describe_groups(module.groups):
        console.print(f"group   {line}")
    console.print(
        f"batch   {config.batch.tokens:,} tokens a step: context {config.batch.context} × micro-batch {data.micro} "
        f"× {data.split.ranks} devices × {data.accumulation} passes, {torch.get_num_threads()} threads"
    )
    budget = "no end" if total is None else f"{total:,} steps = {total * config.batch.tokens:,} tokens"
    hours = "" if config.budget.hours is None else f", at most {config.budget.hours:g} h"
    console.print(f"budget  {budget}{hours}")
    console.print(f"run     {run.path}" + ("" if checkpoint is None else f", resumed from {checkpoint}"))
