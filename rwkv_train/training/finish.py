"""The end of a run: which ending it is, and what the run leaves: weights, samples, loss curve, summary, exit code."""

from __future__ import annotations

import codecs
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rwkv_train.checkpoint.directory import newest
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.storage import LocalStorage, dump
from rwkv_train.evaluation.baselines import baselines
from rwkv_train.evaluation.report.figures import draw_loss_curve
from rwkv_train.exit_codes import Ending, ExitCode
from rwkv_train.inference.export import consolidate
from rwkv_train.inference.generate import generate
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.rundir.jsonl import WriteErrors
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback
from rwkv_train.training.observers import RunTrackers
from rwkv_train.training.requeue import Requeue
from rwkv_train.training.setup import RunSetup
from rwkv_train.training.strategy import ShardedStrategy

if TYPE_CHECKING:
    from rwkv_train.training.build import Training


def finish(training: Training, trackers: RunTrackers, requeue: Requeue) -> Ending:
    """After Lightning's loop has ended by itself: records why, and writes what belongs to that ending.

    Args:
        training: of the run.
        trackers: which get little time where a signal has ended the run.
        requeue: puts the job back after a signal.
    """
    observers, events = training.observers, training.attempt.events
    step, resumable = training.trainer.global_step, next_start(observers.checkpoint)
    if observers.replay is not None:
        return Ending(ExitCode.NEGATIVE if observers.replay.healthy else ExitCode.FINISHED)
    if observers.signals.stopped and step != training.attempt.total_steps:
        trackers.hurry()
        signals = observers.signals
        return requeue.after_signal(events, step, observers.signals.stopped, signals.too_late, resumable)
    if (reason := observers.bad_steps.stopped) is not None:
        events.add("unhealthy", step, reason=reason)
        return Ending(ExitCode.UNHEALTHY, f"\nstopped at step {step}: {reason}; {resumable}")
    return _complete(training, step, resumable)


def _complete(training: Training, step: int, resumable: str) -> Ending:
    """The budget is reached, in steps or in time, or a callback of the user's has stopped the run."""
    setup, attempt, observers = training.setup, training.attempt, training.observers
    total, write_errors = attempt.total_steps, training.write_errors
    attempt.events.add("finished" if step == total else "stopped", step)
    if setup.first:
        write_outputs(setup, training.strategy, step, attempt.metrics.rows(), write_errors)
    messages = []
    if step != total:
        out_of_time = f"budget.hours={setup.config.budget.hours:g} is over" if observers.budget.out_of_time else None
        why = out_of_time or "a callback stopped the run"
        messages.append(f"\n{why}: step {step}" + (f" of {total}" if total else "") + f"; {resumable}")
    refused = write_errors.count + observers.checkpoint.failures + attempt.metrics.lost + attempt.events.lost
    if refused:
        kept = newest(setup.directory.checkpoints)[0] or "none"
        warning = f"the disk refused {refused} writes; the last complete checkpoint is {kept}"
        messages.append(f"[bold red]WARNING[/bold red]: {warning}")
    return Ending(ExitCode.WRITES_REFUSED if refused else ExitCode.FINISHED, "\n".join(messages))


def next_start(saving: CheckpointCallback) -> str:
    """What the same command does next, for people."""
    if saving.last is None:
        return "there is no checkpoint yet: the same command starts at step 0"
    return f"the same command resumes from the checkpoint of step {saving.last}"


def write_sample(setup: RunSetup, step: int, write_errors: WriteErrors) -> None:
    """Appends what the model generates now to samples.txt (temperature 0.8, top-p 0.9; the same draws each time)."""
    settings, run, model, tokenizer = setup.config.samples, setup.directory, setup.model, setup.data.tokenizer
    if settings.tokens == 0:
        return
    with write_errors.tolerate(run.samples):
        training = model.training
        prompt = tokenizer.encode(settings.prompt.encode()).tolist()
        seed = setup.config.seed
        tokens = generate(model.eval(), prompt, settings.tokens, temperature=0.8, top_p=0.9, seed=seed)
        text = codecs.decode(tokenizer.decode(list(tokens)), "utf-8", "replace")
        model.train(training)
        before = run.samples.read_text(encoding="utf-8") if run.samples.exists() else ""
        with run.atomic_write(run.samples) as path:
            path.write_text(f"{before}===== after {step} steps =====\n{settings.prompt}{text}\n\n", encoding="utf-8")


def write_outputs(
    setup: RunSetup, strategy: ShardedStrategy, step: int, rows: Sequence[Mapping[str, Any]], write_errors: WriteErrors
) -> None:
    """After the last step, on the first rank: final weights, a sample, the loss curve, and a summary on the console.

    Args:
        setup: of the run.
        strategy: that has trained the model.
        step: the last one.
        rows: of metrics.jsonl, at least one.
        write_errors: counts what the disk refuses.
    """
    run, data = setup.directory, setup.data
    last = run.checkpoints / str(CheckpointName(step, strategy.attempt))
    if not strategy.divided or last.exists():
        with write_errors.tolerate(run.weights), run.atomic_write(run.weights) as path:
            if strategy.divided:
                consolidate(last, path)
            else:
                with LocalStorage().write(path) as file:
                    dump(setup.model.state_dict(), file)
    if not strategy.sharded:
        write_sample(setup, step, write_errors)
    known = baselines(*data.plain) if data.plain else {}
    title = f"{run.path.name}: {setup.parameters:,} parameters"
    with write_errors.tolerate(run.curve), run.atomic_write(run.curve) as path:
        draw_loss_curve(rows, path, title, known)
    summarise(setup.console, run, rows, known)


def summarise(
    console: Console, run: RunDirectory, rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]
) -> None:
    """Prints the run's figures beside the baselines', the files that it has written, and what to type next.

    Args:
        rows: of metrics.jsonl, at least one.
    """
    validated = [row for row in rows if row.get("val/loss") is not None]
    table = Table("on the held-out text", "nats/byte", "bits/byte", title=None, title_justify="left")
    for name, loss in sorted(baselines.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{loss:.3f}", f"{loss / math.log(2):.3f}")
    if validated:
        bits = validated[-1]["val/bits_per_byte"]
        table.add_row("[bold]this run[/bold]", f"[bold]{bits * math.log(2):.3f}[/bold]", f"[bold]{bits:.3f}[/bold]")
        console.print(table)
        loss, perplexity = validated[-1]["val/loss"], validated[-1]["val/perplexity"]
        console.print(f"validation: {loss:.4f} nats/token, {bits:.4f} bits/byte, perplexity {perplexity:.3f}")
    trained = sum(row["seconds"] for row in rows)
    tokens = rows[-1]["tokens"]
    console.print(f"{rows[-1]['step']} steps, {tokens:,} tokens, {trained / 60:.1f} min in training steps")
    if figures := figures_of(rows):
        of_run = Table(*figures)
        of_run.add_row(*figures.values())
        console.print(of_run)
    console.print("\nFiles:", style="bold")
    files: list[tuple[Path, str]] = [
        (run.weights, "final weights, the field's names"),
        (run.curve, "loss curve"),
        (run.samples, "text generated before and after"),
        (run.metrics, "one JSON object per step"),
        (run.config, "the settled config"),
        (run.checkpoints, "to resume from"),
    ]
    for path, what in files:
        if path.exists():
            console.print(f"  {path}  ({what})", highlight=False, soft_wrap=True)
    console.print("\nWhat to type next:", style="bold")
    console.print(f"  {_typed('rwkv-train')} generate {run.weights} --prompt 'def '", highlight=False, soft_wrap=True)
    console.print(f"  {_typed('rwkv-train')} report {run.path}", highlight=False, soft_wrap=True)
    console.print(f"  {_typed('rwkv-train')} train --help", highlight=False, soft_wrap=True)


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Median speed and MFU, goodput, peak memory and skipped updates of a run, formatted."""
    known = [row for row in rows if "goodput" in row]
    if not known:
        return {}
    last = known[-1]
    figures = {
        "tokens/s": f"{median(row['tokens_per_second'] for row in known):,.0f}",
        "MFU": f"{median(row['mfu'] for row in known):.1%}",
        "goodput": f"{last['goodput']:.1%}",
        "memory": f"{max(row['memory'] for row in known) / 1e9:.2f} GB",
    }
    return figures | ({"updates left out": str(last["skipped"])} if last["skipped"] else {})


def _typed(tool: str) -> str:
    """How a tool of this environment is called from here: by its name where PATH finds it, else by its path."""
    if shutil.which(tool):
        return tool
    path = Path(sys.executable).parent / tool
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
