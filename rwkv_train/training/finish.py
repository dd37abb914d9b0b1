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
from rwkv_train.data.batches import Batches
from rwkv_train.data.learned import LearnedTokenizer, text_of
from rwkv_train.data.store import MemoryStore
from rwkv_train.data.tokenizers import decode_after
from rwkv_train.evaluation.baselines import Bytes, baselines
from rwkv_train.evaluation.report.figures import draw_loss_curve
from rwkv_train.exit_codes import Ending, ExitCode
from rwkv_train.inference.export import consolidate
from rwkv_train.inference.generate import generate
from rwkv_train.inference.loading import load_model
from rwkv_train.models import LanguageModel
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.rundir.history import StartHistory
from rwkv_train.rundir.jsonl import WriteErrors
from rwkv_train.training.callbacks.checkpoint import CheckpointCallback
from rwkv_train.training.observers import RunTrackers
from rwkv_train.training.requeue import Requeue
from rwkv_train.training.setup import RunSetup

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
    step, resumable = training.trainer.global_step, next_start(observers.checkpoint, training.setup.config.resume)
    if observers.replay is not None:
        return Ending(ExitCode.NEGATIVE if observers.replay.healthy else ExitCode.FINISHED)
    if observers.signals.stopped and step != training.attempt.total_steps:
        trackers.hurry()
        signals = observers.signals
        return requeue.after_signal(events, step, observers.signals.stopped, signals.too_late, resumable)
    if (reason := observers.bad_steps.stopped) is not None:
        events.add("unhealthy", step, reason=reason)
        again = repeated(observers.checkpoint, step)
        return Ending(ExitCode.UNHEALTHY, f"\nstopped at step {step}: {reason}; {resumable}{again}")
    return _complete(training, step, resumable)


def _complete(training: Training, step: int, resumable: str) -> Ending:
    """The budget is reached, in steps or in time, or a callback of the user's has stopped the run."""
    setup, attempt, observers = training.setup, training.attempt, training.observers
    total, write_errors = attempt.total_steps, training.write_errors
    attempt.events.add("finished" if step == total else "stopped", step)
    if setup.first:
        strategy, last = training.strategy, setup.directory.checkpoints / str(CheckpointName(step, attempt.number))
        write_outputs(
            setup,
            step,
            attempt.metrics.rows(),
            write_errors,
            weights=(last if last.exists() else None) if strategy.divided else setup.model,
            model=None if strategy.sharded else setup.model,
        )
    messages = []
    if step != total:
        out_of_time = f"budget.hours={setup.config.budget.hours:g} is over" if observers.budget.out_of_time else None
        why = out_of_time or "a callback stopped the run"
        messages.append(f"\n{why}: step {step}" + (f" of {total}" if total else "") + f"; {resumable}")
    refused = write_errors.count + observers.checkpoint.failures + attempt.metrics.lost + attempt.events.lost
    if refused:
        kept = newest(setup.directory.checkpoints, content=False)[0] or "none"
        warning = f"the disk refused {refused} writes; the last complete checkpoint is {kept}"
        messages.append(f"WARNING: {warning}")
    return Ending(ExitCode.WRITES_REFUSED if refused else ExitCode.FINISHED, "\n".join(messages))


def next_start(saving: CheckpointCallback, resume: str = "auto") -> str:
    """What the same command does next, for people.

    Args:
        saving: knows the newest checkpoint of the run.
        resume: the setting of the command.
    """
    if saving.last is None:
        return "there is no checkpoint yet: " + _fixed_start(resume, "the same command starts at step 0")
    newest = f"the checkpoint of step {saving.last}"
    if resume == "auto":
        return f"the same command resumes from {newest}"
    return _fixed_start(resume, "") + f", resume=auto resumes from {newest}"


def repeated(saving: CheckpointCallback, step: int) -> str:
    """Which steps the next start repeats after an unhealthy ending, for people; empty if none."""
    first = 1 + (saving.last or 0)
    if first > step:  # the last step was saved: its weights are good, and the run goes on after it
        return ""
    return (
        f"\n  it repeats the steps {first} to {step} with the same data, bad ones included, and may end in "
        "the same way: lower optim.lr, remove the samples in the events, or set health.* (run.allow_changes=true)"
    )


def _fixed_start(resume: str, automatic: str) -> str:
    """Where a command that names its start begins, whatever the run has saved since."""
    if resume == "auto":
        return automatic
    return "the same command starts at step 0" if resume == "never" else f"the same command starts from {resume} again"


def finish_again(setup: RunSetup, write_errors: WriteErrors) -> None:
    """Makes what a finished run lacks, from its last checkpoint: its process may have ended before that was written.

    Args:
        setup: of the run, whose newest checkpoint is that of its last step; this is rank 0.
        write_errors: counts what the disk refuses.
    """
    run, history = setup.directory, StartHistory(setup.directory)
    checkpoint, _ = newest(run.checkpoints, setup.storage)
    recorded = bool(history.attempts) and history.attempts[-1].ended == "finished"
    if checkpoint is None or (recorded and _whole(run, setup)):
        return
    name = CheckpointName.of(checkpoint)
    number = run.claim_attempt()
    run.attempts.begin(number, name.step, name.attempt)
    with run.records(number, enabled=True) as (events, metrics):
        events.add("resumed", name.step, **history.next_start(name.step))
        sharded = setup.resolved.strategy == "fsdp" or setup.resolved.strategy.startswith("deepspeed_3")
        model = None if sharded else load_model(checkpoint)
        write_outputs(setup, name.step, metrics.rows(), write_errors, weights=checkpoint, model=model)
        events.add("finished", name.step)


def _whole(run: RunDirectory, setup: RunSetup) -> bool:
    """Whether a finished run has everything that `write_outputs` writes."""
    return run.weights.exists() and run.curve.exists() and (run.samples.exists() or setup.config.samples.tokens == 0)


def write_sample(setup: RunSetup, model: LanguageModel, step: int, write_errors: WriteErrors) -> None:
    """Appends what the model generates now to samples.txt (temperature 0.8, top-p 0.9; the same draws each time)."""
    settings, run, tokenizer = setup.config.samples, setup.directory, setup.data.tokenizer
    if settings.tokens == 0:
        return
    with write_errors.tolerate(run.samples):
        training = model.training
        prompt = tokenizer.encode(settings.prompt.encode(errors="surrogateescape")).tolist()
        seed = setup.config.seed
        tokens = generate(model.eval(), prompt, settings.tokens, temperature=0.8, top_p=0.9, seed=seed)
        text = codecs.decode(decode_after(tokenizer, prompt, list(tokens)), "utf-8", "replace")
        model.train(training)
        before = run.samples.read_text(encoding="utf-8") if run.samples.exists() else ""
        with run.atomic_write(run.samples) as path:
            path.write_text(f"{before}===== after {step} steps =====\n{settings.prompt}{text}\n\n", encoding="utf-8")


def write_outputs(
    setup: RunSetup,
    step: int,
    rows: Sequence[Mapping[str, Any]],
    write_errors: WriteErrors,
    weights: LanguageModel | Path | None,
    model: LanguageModel | None,
) -> None:
    """After the last step, on rank 0: final weights, a sample, the loss curve, and a summary on the console.

    Args:
        setup: of the run.
        step: the last one.
        rows: of metrics.jsonl, at least one.
        write_errors: counts what the disk refuses.
        weights: the model, or the checkpoint, that holds the final weights; None: they are nowhere.
        model: that writes the sample; None: no rank holds a complete one.
    """
    run, data = setup.directory, setup.data
    if weights is not None:
        with write_errors.tolerate(run.weights), run.atomic_write(run.weights) as path:
            if isinstance(weights, Path):
                consolidate(weights, path)
            else:
                with LocalStorage().write(path) as file:
                    dump(weights.state_dict(), file)
    if model is not None:
        write_sample(setup, model, step, write_errors)
    plain = plain_text(data)
    known = baselines(*plain) if plain else {}
    title = f"{run.path.name}: {setup.parameters:,} parameters"
    with write_errors.tolerate(run.curve), run.atomic_write(run.curve) as path:
        draw_loss_curve(rows, path, title, _per_token(known, rows))
    summarise(setup.console, run, rows, known)


def plain_text(data: Batches) -> tuple[Bytes, Bytes] | None:
    """Training and held-out text, where the data is one text of which some is held out; None: it is not.

    It must be known to the last byte: read byte by byte, or with a learnt tokenizer.
    """
    known = isinstance(data.tokenizer, LearnedTokenizer) or data.tokenizer.identity == "bytes"
    stores = (data.train, data.held_out)
    one = len(data.sources) == 1 and known and not data.packed and len(data.held_out)
    if not one or not all(isinstance(store, MemoryStore) for store in stores):
        return None
    return text_of(data.tokenizer, data.train.tokens), text_of(data.tokenizer, data.held_out.tokens)


def _per_token(losses: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Losses in nats per byte as those per token of the run's held-out text, for its curve; none without validation."""
    validated = [row for row in rows if row.get("val/loss") and row.get("val/bits_per_byte")]
    if not validated:
        return {}
    bytes_per_token = validated[-1]["val/loss"] / (validated[-1]["val/bits_per_byte"] * math.log(2))
    return {name: loss * bytes_per_token for name, loss in losses.items()}


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
        table.add_row("this run", f"{bits * math.log(2):.3f}", f"{bits:.3f}", style="bold")
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
        (run.tokenizer, "the vocabulary that it has learnt"),
        (run.checkpoints, "to resume from"),
    ]
    for path, what in files:
        if path.exists():
            console.print(f"  {path}  ({what})", highlight=False, soft_wrap=True)
    console.print("\nWhat to type next:", style="bold")
    for command in (f"generate {run.weights} --prompt 'def '", f"report {run.path}", "train --help"):
        console.print(f"  {_typed('rwkv-train')} {command}", highlight=False, soft_wrap=True)


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
    return figures | ({"skipped updates": str(last["skipped"])} if last["skipped"] else {})


def _typed(tool: str) -> str:
    """How a tool of this environment is called from here: by its name where PATH finds it, else by its path."""
    if shutil.which(tool):
        return tool
    path = Path(sys.executable).parent / tool
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
