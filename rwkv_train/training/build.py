"""Everything that trains, made from a run's setup and its attempt: module, strategy, callbacks, Lightning's trainer."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback

from rwkv_train.cluster.environment import environment
from rwkv_train.config.clock import TokenClock
from rwkv_train.instantiate import Makers
from rwkv_train.rundir.jsonl import WriteErrors
from rwkv_train.training.attempt import RunAttempt
from rwkv_train.training.callbacks.stop import StopOnSignal
from rwkv_train.training.finish import write_sample
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.observers import Observers, RunTrackers, make_observers
from rwkv_train.training.setup import RunSetup
from rwkv_train.training.statistics import Statistics
from rwkv_train.training.strategy import ShardedStrategy, build_strategy


@dataclass(frozen=True)
class Training:
    """A run that is ready to train.

    Attributes:
        setup: data, model and settings.
        attempt: this start of the run.
        write_errors: of its records.
        module: the LightningModule.
        strategy: where the state is and how ranks share it.
        observers: our callbacks.
        trainer: Lightning's loop.
    """

    setup: RunSetup
    attempt: RunAttempt
    write_errors: WriteErrors
    module: RWKVModule
    strategy: ShardedStrategy
    observers: Observers
    trainer: L.Trainer


def build(
    setup: RunSetup,
    attempt: RunAttempt,
    write_errors: WriteErrors,
    signals: StopOnSignal,
    trackers: RunTrackers,
    callbacks: Makers[Callback],
) -> Training:
    """Makes what trains. Nothing is written, and no rank waits for another.

    Args:
        setup, attempt, write_errors: of the run.
        signals: the callback that handles signals already.
        trackers: started already.
        callbacks: the user's, called after ours.
    """
    strategy = _build_strategy(setup, attempt)
    sample = None
    if attempt.checkpoint is None and setup.first and not strategy.sharded:
        sample = LambdaCallback(on_train_start=lambda *_: write_sample(setup, setup.model, 0, write_errors))
    observers = make_observers(setup, attempt, write_errors, signals, trackers, sample)
    in_order = [*observers.in_order(), *(make() for make in callbacks)]
    return Training(
        setup=setup,
        attempt=attempt,
        write_errors=write_errors,
        module=build_module(setup, attempt.total_steps, attempt.clock),
        strategy=strategy,
        observers=observers,
        trainer=build_trainer(setup, attempt.total_steps, strategy, in_order),
    )


def build_module(setup: RunSetup, total_steps: int | None, clock: TokenClock) -> RWKVModule:
    """The LightningModule of a run, of so many steps (None: no limit)."""
    config, data = setup.config, setup.data
    every = config.statistics.every.in_steps(config.batch.tokens)
    statistics = Statistics(setup.model, every, [source.name for source in data.sources], hooks=not config.compile)
    validated = [data.sources[number].name for number in data.validated]
    return RWKVModule(
        setup.model,
        setup.recipe,
        config.optim,
        total_steps,
        clock,
        config.compile,
        validated,
        statistics,
        token_bytes=torch.from_numpy(data.token_bytes),
    )


def _build_strategy(setup: RunSetup, attempt: RunAttempt) -> ShardedStrategy:
    block = sum(math.prod(shape) for name, shape in setup.shapes.items() if name.startswith("blocks.0."))
    strategy = build_strategy(setup.config, setup.resolved, block)
    strategy.attach(
        shapes=setup.shapes,
        source=setup.source,
        resume=attempt.checkpoint,
        attempt=attempt.number,
        threads=setup.resolved.threads,
        background=setup.config.checkpoint.background,
    )
    return strategy


def build_trainer(
    setup: RunSetup, total_steps: int | None, strategy: ShardedStrategy, callbacks: list[Callback]
) -> L.Trainer:
    """Lightning's loop over the steps of a run."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # batches are cut from memory
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")  # cluster/rank_info.py knows who started what
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning's own use of torch
    warnings.filterwarnings("ignore", ".*torch.distributed.* is deprecated.*", FutureWarning)  # DeepSpeed's
    # values that a block hands to the next ones (Context.shared); no block changes them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for name in ("lightning.pytorch", "lightning.fabric"):  # `describe` prints what they log about devices
        logging.getLogger(name).setLevel(logging.WARNING)
    config, data, resolved = setup.config, setup.data, setup.resolved
    return L.Trainer(
        accelerator=resolved.accelerator,
        devices=resolved.per_node,
        num_nodes=resolved.nodes,
        plugins=environment(setup.rank_info),
        precision=None if strategy.brings_precision else resolved.precision,  # type: ignore[arg-type]
        strategy=strategy,
        max_steps=total_steps or -1,
        max_epochs=-1,
        accumulate_grad_batches=resolved.accumulation,
        val_check_interval=config.validation.every.in_steps(config.batch.tokens) * resolved.accumulation,
        check_val_every_n_epoch=None,
        limit_val_batches=None if data.validated else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,  # trackers have processes of their own
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=setup.directory.path,
    )
