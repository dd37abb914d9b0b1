"""From the parts of a run to its end: callbacks, Lightning's trainer, and what is left behind."""

from __future__ import annotations

import hashlib
import logging
import math
import signal
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback, LambdaCallback

import rwkv_train
from rwkv_train.checkpoint.directory import list_checkpoints, newest, read_meta, remove_unfinished
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.cluster.environment import environment
from rwkv_train.cluster.preflight import meet
from rwkv_train.data.datamodule import DataModule
from rwkv_train.data.show import show_batch
from rwkv_train.evaluation.baselines import baselines
from rwkv_train.evaluation.curve import draw_loss_curve
from rwkv_train.inference.export import consolidate
from rwkv_train.instantiate import Makers, prepare
from rwkv_train.rundir.history import History
from rwkv_train.rundir.jsonl import JsonLines, WriteErrors
from rwkv_train.rundir.rank_logs import keep_log
from rwkv_train.training.callbacks.bad_steps import read_passed_over
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback, Superseded
from rwkv_train.training.callbacks.ending import StopAtBudget
from rwkv_train.training.callbacks.stop import follow_parent
from rwkv_train.training.callbacks.watchdog import Watchdog
from rwkv_train.training.finish import summarise, write_sample, write_weights
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.observers import HURRY, Observers
from rwkv_train.training.optim import describe_groups, parameter_groups
from rwkv_train.training.replay import HEALTHY
from rwkv_train.training.requeue import GIVEN_UP, Requeue
from rwkv_train.training.setup import RunSetup, check_checkpoint
from rwkv_train.training.statistics import Statistics
from rwkv_train.training.strategy import ShardedStrategy, build_strategy

# exit codes
INTERRUPTED = 130  # by Ctrl-C, before there was a step to finish
SUPERSEDED = 4  # a newer start of the same run goes on with it
DISK_REFUSED = 3  # the run came to its end, but could not write all its checkpoints or records
UNHEALTHY = 5  # health.… stopped the run
STOPPED = 75  # a signal ended the run before its end: the same command goes on (EX_TEMPFAIL of sysexits.h)


def fit(setup: RunSetup) -> int:
    """Trains until the budget is reached; the exit code is that of `train`.

    Raises:
        UserError: a logger or callback that cannot be made, a directory in use, a checkpoint that does not fit.
    """
    config = setup.config
    callbacks = prepare("callbacks", config.callbacks, Callback, config.packages)
    watching, restarts = Observers(setup, WriteErrors()), Requeue(setup)
    with (
        setup.directory.claimed(setup.first, setup.rank_info.job),
        restarts.signals.heard(),
        watching,
        ExitStack() as open_files,
    ):
        _gather(setup)
        code = _fit(setup, watching, callbacks, restarts, open_files)
    restarts.requeue()
    return code


def _gather(setup: RunSetup) -> None:
    """Where there are several processes: do they belong together? From then on each has a log of its own."""
    if setup.rank_info.ranks > 1:
        tree = hashlib.sha256(yaml.safe_dump(setup.tree).encode()).hexdigest()[:16]
        facts = {"code": _versions()["code"], "config": tree, "data": setup.data.digest}
        seconds, needed = setup.config.cluster.preflight, 2 * 12 * setup.parameters
        gpu = setup.accelerator == "gpu"
        meet(setup.rank_info, gpu, facts, setup.directory.path, needed, seconds, setup.console)
    if setup.data.split.ranks > 1:
        keep_log(setup.directory.logs, setup.rank_info)


def _fit(
    setup: RunSetup, watching: Observers, callbacks: Makers[Callback], restarts: Requeue, open_files: ExitStack
) -> int:
    """The run itself, once its directory is ours."""
    config, run, data, console, total = setup.config, setup.directory, setup.data, setup.console, setup.total_steps
    found = list_checkpoints(run.checkpoints, setup.storage)
    checkpoint = _find_checkpoint(setup)
    step = 0 if checkpoint is None else read_meta(checkpoint).step
    if total is not None and step >= total:
        console.print(
            f"{run.path} is finished: {step} of {total} steps.\n"
            "  budget.steps=MORE run.allow_changes=true goes on; run.name=NEW starts anew"
        )
        return 0

    restarts.history = History.read(run)
    number = run.number = run.attempts.claim() if setup.first else 0
    if list_checkpoints(run.checkpoints, setup.storage) != found:  # an older attempt has saved: attempts.py
        checkpoint = _find_checkpoint(setup)
    meta = None if checkpoint is None else read_meta(checkpoint)
    step = 0 if meta is None else meta.step
    write_errors = watching.write_errors
    if setup.first:
        own = checkpoint is not None and checkpoint.absolute().parent == run.checkpoints.absolute()
        name = CheckpointName.parse(checkpoint.name) if checkpoint is not None and own else None
        run.attempts.begin(number, step, None if name is None else name.attempt)
        remove_unfinished(run.checkpoints, number, setup.storage)
        with write_errors.tolerate(run.config), run.atomic_write(run.config) as path:
            path.write_text(yaml.safe_dump(setup.tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    events, lines = open_files.enter_context(run.records(number, setup.first))
    events.tokens_per_step = config.batch.tokens
    if setup.first and restarts.hopeless(events):
        return GIVEN_UP
    events.add("started" if checkpoint is None else "resumed", step, **restarts.history.next_start(step))
    data.skips = [(first, steps) for first, steps in read_passed_over(run)["skips"] or (meta.skips if meta else ())]
    data.begin(step, None if meta is None else meta.position)

    validated = [data.sources[number].name for number in data.validated]
    every = config.statistics.every.in_steps(config.batch.tokens)
    statistics = Statistics(setup.model, every, [source.name for source in data.sources], hooks=not config.compile)
    module = RWKVModule(
        setup.model, setup.recipe, config.optim, total, config.batch.tokens, config.compile, validated, statistics
    )
    saving = CheckpointCallback(
        run.checkpoints,
        config.checkpoint,
        config.batch.tokens,
        {
            "config": setup.tree,
            "data": data.digest,
            "tokenizer": data.tokenizer.identity,
            "versions": _versions(),
        },
        events,
        setup.storage,
    )
    watching.track(step, meta, _versions())
    _describe(setup, checkpoint)
    if data.masked and step == 0:
        show_batch(data.batch(0), data.tokenizer, console, rows=1)
    hours = config.budget.hours
    ending = StopAtBudget(total, None if hours is None else hours * 3600)
    strategy, signals = _strategy(setup, checkpoint, number), restarts.signals
    if not setup.first:
        follow_parent()
    alone = data.split.ranks == 1
    watchdog = Watchdog(
        config.watchdog, run.attempts, setup.first, alone, setup.rank_info.node, partial(events.refresh, force=True)
    )
    saving.restoring = watchdog.restoring
    ours: list[Callback] = [*watching.callbacks(lines, events, saving), ending, signals, watchdog]
    if checkpoint is None and setup.first and not strategy.sharded:
        ours.append(LambdaCallback(on_train_start=lambda *_: _sample(setup, 0, write_errors)))
    trainer = _trainer(setup, strategy, [*ours, *(make() for make in callbacks)])
    try:
        with watchdog.watching():
            trainer.fit(module, datamodule=DataModule(data), ckpt_path=checkpoint)
    except SystemExit:  # Lightning's answer to a Ctrl-C before the first step
        if not trainer.interrupted:
            raise
        console.print(f"\ninterrupted; {_next_time(saving)}")
        return INTERRUPTED
    except Superseded:
        console.print(f"\na newer start of {run.path} goes on with it; this one ends at step {trainer.global_step}")
        return SUPERSEDED
    except BaseException as error:
        hopeless = restarts.after_failure(error, events, lines, strategy)
        if strategy.launcher is not None:  # the ranks that it has started would wait for this one
            strategy.launcher.kill(signal.SIGKILL)
        if hopeless:
            return GIVEN_UP
        raise
    step = trainer.global_step
    if watching.replay is not None:
        return HEALTHY if watching.replay.healthy else 0
    if signals.stopped and step != total:
        watching.patience = HURRY
        restarts.after_signal(events, step, signals.stopped, signals.too_late, _next_time(saving))
        return STOPPED if setup.first else 0  # Lightning kills the first rank when another one's code is not 0
    if watching.health.stopped is not None:
        events.add("unhealthy", step, reason=watching.health.stopped)
        console.print(f"\nstopped at step {step}: {watching.health.stopped}; {_next_time(saving)}")
        return UNHEALTHY if setup.first else 0
    events.add("finished" if step == total else "stopped", step)
    _finish(setup, strategy, step, lines, write_errors)
    if step != total:
        why = f"budget.hours={hours:g} is over" if ending.out_of_time else "a callback stopped the run"
        console.print(f"\n{why}: step {step}" + (f" of {total}" if total else "") + f"; {_next_time(saving)}")
    refused = write_errors.count + saving.failures + lines.lost + events.lost
    if not refused:
        return 0
    kept = newest(run.checkpoints)[0] or "none"
    console.print(
        f"[bold red]WARNING[/bold red]: the disk refused {refused} writes; the last complete checkpoint is {kept}"
    )
    return DISK_REFUSED if setup.first else 0


def _next_time(saving: CheckpointCallback) -> str:
    if saving.last is None:
        return "there is no checkpoint yet: the same command starts at step 0"
    return f"the same command goes on from the checkpoint of step {saving.last}"


def _sample(setup: RunSetup, step: int, write_errors: WriteErrors) -> None:
    config, run = setup.config, setup.directory
    with write_errors.tolerate(run.samples):
        write_sample(setup.model, setup.data.tokenizer, config.samples, config.seed, step, run)


def _finish(setup: RunSetup, strategy: ShardedStrategy, step: int, lines: JsonLines, write_errors: WriteErrors) -> None:
    """After the last step: final weights, samples, curve and summary, by the first process."""
    if not setup.first:
        return
    run, data = setup.directory, setup.data
    last = run.checkpoints / str(CheckpointName(step, strategy.attempt))
    if not strategy.divided or last.exists():
        with write_errors.tolerate(run.weights), run.atomic_write(run.weights) as path:
            if strategy.divided:
                consolidate(last, path)
            else:
                write_weights(setup.model, path)
    if not strategy.sharded:
        _sample(setup, step, write_errors)
    known = baselines(*data.plain) if data.plain else {}
    title = f"{run.path.name}: {setup.parameters:,} parameters"
    rows = lines.rows()
    with write_errors.tolerate(run.curve), run.atomic_write(run.curve) as path:
        draw_loss_curve(rows, path, title, known)
    summarise(setup.console, run, rows, known)


def _find_checkpoint(setup: RunSetup) -> Path | None:
    """What to resume from; names damaged checkpoints that are passed over."""
    if setup.config.resume == "never":
        return None
    if setup.config.resume != "auto":
        return Path(setup.config.resume).expanduser()
    directory = setup.directory.checkpoints
    found, damaged = newest(directory, setup.storage, content=setup.first)
    for damage in damaged:
        setup.console.print(f"[bold red]damaged checkpoint passed over[/bold red]: {damage.path}: {damage.reason}")
    if found is not None:
        check_checkpoint(found, setup)
    elif setup.config.resume_typed:
        setup.console.print(f"resume=auto: nothing to resume in {directory}; the run starts at step 0")
    return found


def _strategy(setup: RunSetup, checkpoint: Path | None, number: int) -> ShardedStrategy:
    block = sum(math.prod(shape) for name, shape in setup.shapes.items() if name.startswith("blocks.0."))
    strategy = build_strategy(setup.config, setup.strategy, setup.accelerator, setup.processes, setup.data.split, block)
    strategy.shapes, strategy.source, strategy.resume = setup.shapes, setup.source, checkpoint
    strategy.threads = torch.get_num_threads()
    strategy.attempt = number
    return strategy


def _trainer(setup: RunSetup, strategy: ShardedStrategy, callbacks: list[Callback]) -> L.Trainer:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # batches are cut from memory
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")  # who started what, the place says
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning's own use of torch
    warnings.filterwarnings("ignore", ".*torch.distributed.* is deprecated.*", FutureWarning)  # DeepSpeed's
    for room in ("lightning.pytorch", "lightning.fabric"):  # what they say of devices, our own head of a run says
        logging.getLogger(room).setLevel(logging.WARNING)
    config, data = setup.config, setup.data
    return L.Trainer(
        accelerator=setup.accelerator,
        devices=setup.processes,
        num_nodes=config.trainer.machines,
        plugins=environment(setup.rank_info),
        precision=None if strategy.brings_precision else config.trainer.precision,  # type: ignore[arg-type]
        strategy=strategy,
        max_steps=setup.total_steps or -1,
        max_epochs=-1,
        accumulate_grad_batches=data.accumulation,
        val_check_interval=config.validation.every.in_steps(config.batch.tokens) * data.accumulation,
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


def _versions() -> dict[str, str]:
    code = hashlib.sha256()
    for path in sorted(Path(rwkv_train.__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    ours = {"rwkv_train": rwkv_train.__version__, "code": code.hexdigest()[:16]}
    return {**ours, "torch": torch.__version__, "lightning": L.__version__}


def _describe(setup: RunSetup, checkpoint: Path | None) -> None:
    """The head of a run: what is trained on what, how, and where it is kept."""
    config, data, shape, say = setup.config, setup.data, setup.model.config, setup.console.print
    say(f"data    {data.description}")
    sizes = f"L{shape.n_layer} C{shape.n_embd} V{shape.vocab_size}"
    say(f"model   {shape.arch} {config.model.size}: {sizes}, {setup.parameters:,} parameters")
    groups = parameter_groups(setup.model, setup.recipe, config.optim.weight_decay, config.optim.rules)
    for line in describe_groups(groups):
        say(f"group   {line}")
    split = data.split
    say(
        f"batch   {config.batch.tokens:,} tokens a step: context {config.batch.context} × micro-batch {split.micro} "
        f"× {split.ranks} devices × {split.accumulation} passes, {torch.get_num_threads()} threads"
    )
    total, hours = setup.total_steps, config.budget.hours
    budget = "no end" if total is None else f"{total:,} steps = {total * config.batch.tokens:,} tokens"
    say(f"budget  {budget}" + ("" if hours is None else f", at most {hours:g} h"))
    say(f"run     {setup.directory.path}" + ("" if checkpoint is None else f", resumed from {checkpoint}"))
