"""`rwkv-train eval CKPT`: perplexity on stores and text, and the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.config import DataSettings, SourceSettings
from rwkv_train.config.schema import from_tree
from rwkv_train.console import make_console
from rwkv_train.data.arrays import Ints
from rwkv_train.data.bits_per_byte import token_bytes
from rwkv_train.data.learned import learned_of
from rwkv_train.data.manifest import read_manifest
from rwkv_train.data.sources import digest_of, open_sources, stores_of
from rwkv_train.data.store import Store
from rwkv_train.data.tokenizers import Tokenizer
from rwkv_train.data.validation import Validation
from rwkv_train.errors import UserError
from rwkv_train.evaluation.perplexity import PerplexityResult, combine, cut, measure, measure_batches, within
from rwkv_train.inference.loading import description_of, learned_tokenizer, load_model, tokenizer_of
from rwkv_train.models import LanguageModel
from rwkv_train.user_path import user_path

_DEFAULT_CONTEXT = 1024  # for weights without the configuration of their run


_LARGEST_CONTEXT = 2**24  # tokens; the table has a sum for each position


@dataclass(frozen=True)
class EvalOptions:
    """The options of `rwkv-train eval`.

    Attributes:
        checkpoint: a checkpoint directory, or a .pth file.
        data: stores, text files or directories, each as PATH or NAME=PATH. Without data and tasks, the held-out data
            of the checkpoint's run is evaluated.
        tokenizer: bytes, world or a tokenizer.json; None: the checkpoint's own.
        context: tokens of a window; None: the run's.
        tokens: maximum number of tokens of each source; None: all, or those of the run's validation.
        batch: windows or requests at once.
        tasks: names of lm-eval tasks, each item one or several separated by commas.
        include: directories with your own tasks.
        shots: examples in a prompt; None: as the task defines.
        limit: maximum number of questions per task; None: all.
        max_length: maximum number of tokens that a prediction of a task sees; None: all.
        seed: seed of tasks that sample.
        device: cpu, cuda, or auto.
        as_json: whether to print one JSON object instead of tables.
        out: file for that object; None: none is written.
    """

    checkpoint: str
    data: Sequence[str] = ()
    tokenizer: str | None = None
    context: int | None = None
    tokens: int | None = None
    batch: int = 8
    tasks: Sequence[str] = ()
    include: Sequence[str] = ()
    shots: int | None = None
    limit: int | None = None
    max_length: int | None = None
    seed: int = 0
    device: str = "auto"
    as_json: bool = False
    out: str | None = None

    def check(self) -> None:
        """Raises a UserError if an option is out of range, `out` has no directory, or lm-eval is missing."""
        for name, minimum in (
            ("context", 1),
            ("tokens", 1),
            ("batch", 1),
            ("shots", 0),
            ("limit", 1),
            ("max_length", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"--{name.replace('_', '-')} {value} is out of range", f"valid: {minimum} or more")
        if self.context is not None and self.context > _LARGEST_CONTEXT:
            raise UserError(f"--context {self.context} is out of range", f"valid: up to {_LARGEST_CONTEXT}")
        if self.out is not None and not user_path(self.out).absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: its directory does not exist", "create it, or give another path")
        if self.tasks and find_spec("lm_eval") is None:
            raise UserError("--tasks needs lm-eval, which is not installed", "pip install 'rwkv-train[eval]'")


def run(options: EvalOptions) -> int:
    """Evaluates a checkpoint, and prints or writes the results.

    Returns:
        The exit code, 0.

    Raises:
        UserError: an option is invalid, or a checkpoint, source, tokenizer or task is missing or does not match.
    """
    options.check()
    checkpoint = user_path(options.checkpoint)
    names = [name for item in options.tasks for name in item.split(",") if name]
    task_manager = None
    if names:
        from rwkv_train.evaluation import lm_eval_adapter

        task_manager = lm_eval_adapter.find_tasks(names, [user_path(folder) for folder in options.include])
    model = load_model(checkpoint, options.device)
    meta = description_of(checkpoint)
    tokenizer = tokenizer_of(checkpoint, model.config.vocab_size, options.tokenizer)
    shape = model.config
    results: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "step": None if meta is None else meta.step,
        "model": {"arch": shape.arch, "n_layer": shape.n_layer, "n_embd": shape.n_embd, "vocab_size": shape.vocab_size},
        "tokenizer": tokenizer.identity,
    }
    context = _context(options, meta)
    sources = [] if names and not options.data else _sources(options, meta, model, tokenizer, context)
    with Progress(console=make_console(stderr=True), transient=True) as progress:
        if sources:
            results |= _perplexities(sources, context, progress)
        if task_manager is not None:
            lm = lm_eval_adapter.LmEvalAdapter(
                model, tokenizer, options.batch, options.max_length, options.seed, progress
            )
            results["tasks"] = lm_eval_adapter.run_tasks(lm, names, task_manager, options.shots, options.limit)
    if options.out is not None:
        _write(user_path(options.out), results)
    if options.as_json:
        print(json.dumps(results))
    else:
        _print_tables(results)
    return 0


def _context(options: EvalOptions, meta: CheckpointMeta | None) -> int:
    """Tokens of a window: that of the options, or of the run."""
    config = {} if meta is None else meta.config
    run_context = (config.get("validation") or {}).get("context") or (config.get("batch") or {}).get("context")
    return int(options.context or run_context or _DEFAULT_CONTEXT)


class _Source(NamedTuple):
    """What is evaluated: its name, the number of tokens to score, and what scores them and reports its progress."""

    name: str
    tokens: int
    measure: Callable[[Callable[[int], None]], PerplexityResult]


def _sources(
    options: EvalOptions, meta: CheckpointMeta | None, model: LanguageModel, tokenizer: Tokenizer, context: int
) -> list[_Source]:
    """The data of the options, or the validation of the run."""
    if not options.data:
        return _validation(options, meta, model, tokenizer, context)
    return [
        _Source(
            name,
            min(len(store) - 1, options.tokens or len(store)),
            partial(measure, model, tokenizer, name, store, context, options.batch, options.tokens),
        )
        for name, store in _stores(options, meta, tokenizer)
    ]


def _stores(options: EvalOptions, meta: CheckpointMeta | None, tokenizer: Tokenizer) -> list[tuple[str, Store]]:
    """The tokens of `--data`, by name."""
    parts: list[SourceSettings] = []
    for item in options.data:
        name, separator, path = item.partition("=")
        if not separator or "/" in name:
            name, path = Path(item).stem or item, item
        if name in {part.name for part in parts}:
            raise UserError(f"--data {item}: there are two sources named {name}", "name them: --data NAME=PATH")
        parts.append(SourceSettings(name, path, None, None))
    data = DataSettings("mixture", None, tokenizer.name, 0.0, sources=tuple(parts))
    for part in parts:
        stem = user_path(part.path)
        if not stem.exists() and not stem.with_name(f"{stem.name}.idx").exists() and "*" not in part.path:
            raise UserError(f"--data {part.path}: there is no such store or text", "give a path that exists")
    for stems in stores_of(data):
        for stem in stems:
            manifest = read_manifest(stem)
            ours = tokenizer.identity
            if manifest is not None and manifest.identity not in (ours, ours.split("+")[0]):
                raise UserError(
                    f"--data {stem}: the store was made with the tokenizer {manifest.identity}, {options.checkpoint} "
                    f"was trained with {ours}",
                    "prepare the store with that tokenizer, or give the text itself",
                )
    extend = () if meta is None else meta.config.get("vocab", {}).get("extend", ())
    _, opened = open_sources(data, extend, learned_of(tokenizer))
    short = next((source.name for source in opened if len(source.train) < 2), None)
    if short is not None:
        raise UserError(f"--data {short} has fewer than two tokens, so none can be predicted", "give a longer text")
    return [(source.name, source.train) for source in opened]


def _validation(
    options: EvalOptions, meta: CheckpointMeta | None, model: LanguageModel, tokenizer: Tokenizer, context: int
) -> list[_Source]:
    """The rows that the run's validation scores, or with --tokens others of its held-out text."""
    validation = _find_validation(options, meta, model.config.vocab_size)
    table = token_bytes(tokenizer, model.config.vocab_size)
    sources = [_held_out(options, validation, number, model, table, context) for number in validation.validated]
    found = [source for source in sources if source.tokens]
    if not found:
        raise UserError(
            f"the run of {options.checkpoint} held out no data", "give the data to evaluate on: --data PATH"
        )
    return found


def _held_out(
    options: EvalOptions, validation: Validation, number: int, model: LanguageModel, table: Ints, context: int
) -> _Source:
    """The held-out text of one source."""
    rows, name = validation.rows[number], validation.sources[number].name
    every = np.arange(rows.per_epoch)
    chosen, positions = validation.chosen[number], context
    if options.tokens is not None:
        chosen, positions = within(every, context, options.tokens)
    parts = (chosen[first : first + options.batch] for first in range(0, len(chosen), options.batch))
    batches = (cut(validation.batch(number, part), positions) for part in parts)
    available = int(rows.count_predictions(every).sum())
    tokens = min(int(rows.count_predictions(chosen).sum()), options.tokens or sys.maxsize)
    return _Source(name, tokens, partial(measure_batches, model, table, name, batches, context, available))


def _find_validation(options: EvalOptions, meta: CheckpointMeta | None, vocabulary: int) -> Validation:
    """Raises a UserError where the run's data is not found, or is not what the run was validated on."""
    remedy = "give the data to evaluate on, --data PATH (a store, a text file or a directory), or --tasks"
    try:
        if meta is None:
            raise UserError("the checkpoint belongs to no run")
        learned = learned_tokenizer(Path(options.checkpoint))
        validation = Validation.of_run(from_tree(meta.config), vocabulary, options.context, learned)
    except UserError as error:
        what = f"the held-out data of the run of {options.checkpoint} is not found ({error.what})"
        raise UserError(what, remedy) from None
    digest = digest_of(validation.sources)
    if digest != meta.data:
        what = f"the data of the run of {options.checkpoint} has changed: content hash {meta.data} → {digest}"
        raise UserError(what, f"restore the data; or {remedy}")
    return validation


def _perplexities(sources: Sequence[_Source], context: int, progress: Progress) -> dict[str, Any]:
    results = []
    for source in sources:
        bar = progress.add_task(source.name, total=source.tokens)
        results.append(source.measure(partial(progress.advance, bar)))
        if not results[-1].tokens:
            raise UserError(f"no token of {source.name} has a loss among those of --tokens", "give a larger --tokens")
    sources_json = [result.as_json() for result in results]
    return {"context": context, "sources": sources_json, "all": combine(results).as_json()}


def _write(path: Path, results: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}", "give another path") from None


def _print_tables(results: Mapping[str, Any]) -> None:
    console = make_console()
    step = f", step {results['step']:,}" if results["step"] is not None else ""
    shape = results["model"]
    console.print(
        f"{results['checkpoint']}{step}: {shape['arch']} L{shape['n_layer']} C{shape['n_embd']} "
        f"V{shape['vocab_size']}, tokenizer {results['tokenizer']}",
        soft_wrap=True,
    )
    if "sources" in results:
        _print_perplexities(results, console)
    if "tasks" in results:
        table = Table("task", "metric", _right("value"))
        for name, metrics in results["tasks"].items():
            for metric, value in metrics.items():
                table.add_row(name, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
        console.print(table)


def _print_perplexities(results: Mapping[str, Any], console: Console) -> None:
    """Two tables: the sources, and the loss by position of all of them."""
    rows = results["sources"] if len(results["sources"]) == 1 else [*results["sources"], results["all"]]
    table = Table("source", *(_right(name) for name in ("tokens", "nats/token", "perplexity", "bits/byte")))
    for row in rows:
        tokens = f"{row['tokens']:,}" + (f" of {row['of_tokens']:,}" if row["tokens"] < row["of_tokens"] else "")
        figures = (f"{row['nats_per_token']:.4f}", f"{row['perplexity']:,.3f}", f"{row['bits_per_byte']:.4f}")
        table.add_row(row["name"], tokens, *figures)
    console.print(table)
    table = Table(f"position (of {results['context']:,})", _right("nats/token"), _right("perplexity"))
    for row in results["all"]["by_position"]:
        positions = f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,} – {row['to']:,}"
        loss = row["nats_per_token"]
        table.add_row(positions, f"{loss:.4f}", f"{math.exp(min(loss, 700)):,.3f}")
    console.print(table)


def _right(name: str) -> Column:
    return Column(name, justify="right")
