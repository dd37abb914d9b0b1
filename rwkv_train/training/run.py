"""From a checked config to a trained model: the one file that knows all rooms."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
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
from rwkv_train.training.instantiate import prepare
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.optim import describe_groups
from rwkv_train.training.outcome import summarise, write_sample, write_weights
from rwkv_train.training.records import Events, JsonLines
from rwkv_train.training.strategy import build_strategy
from rwkv_train.training.throughput import keep_freed_memory
from rwkv_train.words import as_tree, differences

DISK_REFUSED = 3  # exit codes: the run came to its end, but could not write all its checkpoints or records;
INTERRUPTED = 130  # stopped by Ctrl-C


@dataclass(frozen=True)
class Parts:
    """What a run is made of. Making them finds every mistake, and writes nothing."""

    config: Config
    tree: dict[str, Any]  # the config as config.yaml and checkpoints hold it
    first: bool  # whether this process is the one that speaks and writes
    console: Console
    accelerator: str
    processes: int  # on this node
    data: DataModule
    model: RWKV
    loggers: Sequence[Callable[[], Logger]]
    callbacks: Sequence[Callable[[], Callback]]
    directory: RunDirectory
    storage: Storage | None

    @property
    def total_steps(self) -> int | None:
        budget = self.config.budget.total
        return None if budget is None else budget.in_steps(self.config.batch.tokens)


def train(config: Config, storage: Storage | None = None) -> int:
    """Trains as the config says; goes on where a run of that name was left.

    Args:
        config: settled and checked.
        storage: of the checkpoints; None: the local file system.

    Returns:
        the exit code: 0, 3 where the disk refused a checkpoint or a record, 130 when interrupted.

    Raises:
        UserError: what shows only with the data, the devices or the checkpoint at hand. Nothing was written then.
    """
    parts = _assemble(config, storage)
    with parts.directory.claimed(parts.first):
        return _fit(parts)


def _assemble(config: Config, storage: Storage | None) -> Parts:
    first = not getattr(rank_zero_only, "rank", 0)
    accelerator, processes = _devices(config)
    torch.set_num_threads(config.threads or max(1, _cores() // (processes if accelerator == "cpu" else 1)))
    keep_freed_memory()
    data = DataModule(
        config.data, config.batch, config.seed, processes * config.trainer.num_nodes, config.validation.batches
    )
    parts = Parts(
        config=config,
        tree=as_tree(config),
        first=first,
        console=Console(quiet=not first, highlight=False, soft_wrap=True),
        accelerator=accelerator,
        processes=processes,
        data=data,
        model=_build(config, data.vocab_size),
        loggers=prepare("logger", config.logger, Logger, config.packages),  # type: ignore[type-abstract]
        callbacks=prepare("callbacks", config.callbacks, Callback, config.packages),
        directory=RunDirectory(config.run.root, config.run.name),
        storage=storage,
    )
    if config.resume not in ("auto", "never"):
        _check_checkpoint(Path(config.resume), parts)
    return parts


def _fit(parts: Parts) -> int:
    """The run itself, once its directory is ours."""
    config, run, data, console, total = parts.config, parts.directory, parts.data, parts.console, parts.total_steps
    checkpoint = _find_checkpoint(parts)
    step = 0 if checkpoint is None else int(read_meta(checkpoint)["step"])
    if total is not None and step >= total:
        console.print(
            f"{run.path} is finished: {step} of {total} steps.\n"
            "  budget.steps=MORE run.allow_changes=true goes on; run.name=NEW starts anew"
        )
        return 0

    events, lines = Events(run.events, parts.first), JsonLines(run.metrics, parts.first)
    if parts.first:
        remove_unfinished(run.checkpoints, parts.storage)
        set_aside_newer(run.checkpoints, step)
        run.config.write_text(yaml.safe_dump(parts.tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    lines.cut(step)
    events.add("started" if checkpoint is None else "resumed", step)
    data.start_step = step

    module = RWKVModule(parts.model, config.optim, total, config.batch.tokens, config.compile)
    metrics = Metrics(lines, data.bytes_per_token)
    saving = Checkpointing(
        run.checkpoints,
        config.checkpoint.every.in_steps(config.batch.tokens),
        config.checkpoint.keep,
        {"config": parts.tree, "data": data.digest, "versions": _versions()},
        events,
        parts.storage,
    )
    _describe(parts, module, checkpoint)
    if checkpoint is None and parts.first:
        write_sample(parts.model, data.tokenizer, config.samples, config.seed, 0, run)
    trainer = _trainer(parts, [metrics, saving, ProgressBar(metrics, total, console)])
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit:
        if not trainer.interrupted:
            raise
        console.print(f"\ninterrupted at step {trainer.global_step}; the same command goes on from the last checkpoint")
        return INTERRUPTED
    events.add("finished" if trainer.global_step == total else "stopped", trainer.global_step)
    return _finish(parts, trainer.global_step, saving.failures + lines.lost + events.lost)


def _finish(parts: Parts, step: int, refused: int) -> int:
    """After the last step: final weights, samples, curve and summary, by the first process."""
    if not parts.first:
        return 0
    config, run, data, model, console = parts.config, parts.directory, parts.data, parts.model, parts.console
    try:
        write_weights(model, run)
        write_sample(model, data.tokenizer, config.samples, config.seed, step, run)
        comparable = len(data.held_out) and data.tokenizer.name == "bytes"
        known = baselines(data.train.tokens, data.held_out.tokens) if comparable else {}
        title = f"{run.path.name}: {sum(p.numel() for p in model.parameters()):,} parameters"
        summarise(console, run, title, known)
    except OSError as error:
        console.print(f"[bold red]WARNING[/bold red]: {error.filename} could not be written: {error.strerror}")
        refused += 1
    if not refused:
        return 0
    kept, _ = newest(run.checkpoints)
    console.print(
        f"[bold red]WARNING[/bold red]: the disk refused {refused} writes; the last whole checkpoint is {kept}"
    )
    return DISK_REFUSED


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


def _build(config: Config, vocab_size: int) -> RWKV:
    """The model with its first weights: the recipe's, or those of init.weights."""
    settings = config.model
    shape = ModelConfig(
        config.arch, settings.n_layer, settings.n_embd, settings.vocab_size or vocab_size, settings.dim_ffn
    )
    if config.init_weights is None:
        model = build_model(shape, config.seed)
    else:
        weights = load_weights(Path(config.init_weights).expanduser())
        model = build_model(shape, device="meta").to_empty(device="cpu")
        _refuse(f"init.weights={config.init_weights}", mismatches(weights, model))
        model.load_state_dict(weights)
    model.activation_checkpointing = config.activation_checkpointing
    return model


def _refuse(what: str, different: Sequence[str]) -> None:
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{what} does not fit the model: {'; '.join(different[:3])}{more}", "give the model's own shape"
        )


def _check_checkpoint(path: Path, parts: Parts) -> None:
    """Refuses to go on from a checkpoint of another model, other data or another config."""
    meta = read_meta(path)
    _refuse(f"the checkpoint {path}", mismatches(load_weights(path), parts.model))
    changed = differences(meta["config"], parts.tree)
    if meta["data"] != parts.data.digest:
        changed.append(f"the data itself: content hash {meta['data']} → {parts.data.digest}")
    if changed and not parts.config.run.allow_changes:
        raise UserError(
            f"the checkpoint {path} was made with another config: {'; '.join(changed)}",
            "go on all the same: run.allow_changes=true; a new run: run.name=NEW",
        )


def _find_checkpoint(parts: Parts) -> Path | None:
    """What to resume from; names damaged checkpoints that are passed over."""
    if parts.config.resume == "never":
        return None
    if parts.config.resume != "auto":
        return Path(parts.config.resume)
    directory = parts.directory.checkpoints
    found, damaged = newest(directory, parts.storage)
    for damage in damaged:
        parts.console.print(f"[bold red]damaged checkpoint passed over[/bold red]: {damage.path}: {damage.reason}")
    if found is not None:
        _check_checkpoint(found, parts)
    else:
        parts.console.print(f"resume=auto: nothing to resume in {directory}; the run starts at step 0")
    return found


def _trainer(parts: Parts, ours: list[Callback]) -> L.Trainer:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # batches are cut from memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning's own use of torch
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    config, data = parts.config, parts.data
    if config.budget.hours is not None:
        ours.append(Timer(timedelta(hours=config.budget.hours), verbose=False))
    return L.Trainer(
        accelerator=parts.accelerator,
        devices=parts.processes,
        num_nodes=config.trainer.num_nodes,
        precision=config.trainer.precision,  # type: ignore[arg-type]
        strategy=build_strategy(config.strategy, parts.accelerator, data.split.ranks),
        max_steps=parts.total_steps or -1,
        max_epochs=-1,
        accumulate_grad_batches=data.accumulation,
        val_check_interval=config.validation.every.in_steps(config.batch.tokens) * data.accumulation,
        check_val_every_n_epoch=None,
        limit_val_batches=None if len(data.held_out) else 0,
        num_sanity_val_steps=0,
        callbacks=[*ours, *(make() for make in parts.callbacks)],
        logger=[make() for make in parts.loggers],
        plugins=[DirectoryCheckpointIO(parts.storage)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=parts.directory.path,
    )


def _versions() -> dict[str, str]:
    return {"rwkv_train": rwkv_train.__version__, "torch": torch.__version__, "lightning": L.__version__}


def _describe(parts: Parts, module: RWKVModule, checkpoint: Path | None) -> None:
    """The head of a run: what is trained on what, how, and where it is kept."""
    config, data, shape, say = parts.config, parts.data, parts.model.config, parts.console.print
    parameters = sum(p.numel() for p in parts.model.parameters())
    say(f"data    {data.description}")
    sizes = f"L{shape.n_layer} C{shape.n_embd} V{shape.vocab_size}"
    say(f"model   {shape.arch} {config.model.size}: {sizes}, {parameters:,} parameters")
    for line in describe_groups(module.groups):
        say(f"group   {line}")
    split = data.split
    say(
        f"batch   {config.batch.tokens:,} tokens a step: context {config.batch.context} × micro-batch {split.micro} "
        f"× {split.ranks} devices × {split.accumulation} passes, {torch.get_num_threads()} threads"
    )
    total, hours = parts.total_steps, config.budget.hours
    budget = "no end" if total is None else f"{total:,} steps = {total * config.batch.tokens:,} tokens"
    say(f"budget  {budget}" + ("" if hours is None else f", at most {hours:g} h"))
    say(f"run     {parts.directory.path}" + ("" if checkpoint is None else f", resumed from {checkpoint}"))
