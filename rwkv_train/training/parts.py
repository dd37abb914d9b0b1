"""The parts of a run, made from a checked config.

Making them finds every mistake that needs the data, the weights or the devices, and writes nothing. No Lightning here:
it takes seconds to import.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rwkv_train.config import Config
from rwkv_train.data.batches import Batches
from rwkv_train.data.sources import refuse_large
from rwkv_train.errors import UserError
from rwkv_train.models import RWKV, ModelConfig, build_model
from rwkv_train.models.weights import grow_vocabulary, load_weights, refuse_mismatches
from rwkv_train.training.checkpoint import Storage, read_meta
from rwkv_train.training.directory import RunDirectory
from rwkv_train.training.throughput import keep_freed_memory
from rwkv_train.words import as_tree, differences


@dataclass(frozen=True)
class Parts:
    """What a run is made of. Making them finds every mistake, and writes nothing."""

    config: Config
    tree: dict[str, Any]  # the config as config.yaml and checkpoints hold it
    first: bool  # whether this process is the one that speaks and writes
    console: Console
    accelerator: str
    processes: int  # on this node
    data: Batches
    model: RWKV
    directory: RunDirectory
    storage: Storage | None

    @property
    def total_steps(self) -> int | None:
        budget = self.config.budget.total
        return None if budget is None else budget.in_steps(self.config.batch.tokens)


def assemble(config: Config, storage: Storage | None = None, rank: int = 0) -> Parts:
    """Makes the parts of a run.

    Raises:
        UserError: what `train` raises before it writes anything.
    """
    first = rank == 0
    accelerator, processes = _devices(config)
    torch.set_num_threads(config.threads or max(1, _cores() // (processes if accelerator == "cpu" else 1)))
    keep_freed_memory()
    data = Batches(
        config.data,
        config.batch,
        config.seed,
        processes * config.trainer.num_nodes,
        config.validation.batches,
        config.validation.context,
        config.vocab.extend,
    )
    budget = config.budget.total
    data.refuse_budget(None if budget is None else budget.in_steps(config.batch.tokens))
    data.vocabulary = config.model.vocab_size or data.vocab_size
    refuse_large(data.largest_token, data.vocabulary, f"data.path={config.data.path}")
    parts = Parts(
        config=config,
        tree=as_tree(config),
        first=first,
        console=Console(quiet=not first, highlight=False, soft_wrap=True),
        accelerator=accelerator,
        processes=processes,
        data=data,
        model=_build(config, data.vocabulary),
        directory=RunDirectory(config.run.root, config.run.name),
        storage=storage,
    )
    if config.resume not in ("auto", "never"):
        check_checkpoint(Path(config.resume).expanduser(), parts)
    return parts


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
    shape = ModelConfig(config.arch, settings.n_layer, settings.n_embd, vocab_size, settings.dim_ffn)
    if config.init_weights is None:
        model = build_model(shape, config.seed)
    else:
        weights = grow_vocabulary(load_weights(Path(config.init_weights).expanduser()), len(config.vocab.extend))
        model = build_model(shape, device="meta").to_empty(device="cpu")
        refuse_mismatches(f"init.weights={config.init_weights}", weights, model)
        model.load_state_dict(weights)
    model.activation_checkpointing = config.activation_checkpointing
    return model


def check_checkpoint(path: Path, parts: Parts) -> None:
    """Refuses to go on from a checkpoint of another model, other data or another config."""
    meta = read_meta(path)
    refuse_mismatches(f"the checkpoint {path}", load_weights(path), parts.model)
    changed = differences(meta["config"], parts.tree)
    if meta["data"] != parts.data.digest:
        changed.append(f"the data itself: content hash {meta['data']} → {parts.data.digest}")
    tokenizer = parts.data.tokenizer.identity
    if meta.get("tokenizer", tokenizer) != tokenizer:
        changed.append(f"the tokenizer: {meta['tokenizer']} → {tokenizer}")
    if changed and not parts.config.run.allow_changes:
        raise UserError(
            f"the checkpoint {path} was made with another config: {'; '.join(changed)}",
            "go on all the same: run.allow_changes=true; a new run: run.name=NEW",
        )
