"""`rwkv-train eval CKPT`: perplexity on stores and text, and lm-evaluation-harness's tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from rwkv_train.config import DataSettings, SourceSettings
from rwkv_train.config.schema import from_tree
from rwkv_train.data.manifest import read_manifest
from rwkv_train.data.sources import open_sources, stores_of
from rwkv_train.data.store import Store
from rwkv_train.data.tokenizers import Tokenizer
from rwkv_train.errors import UserError
from rwkv_train.evaluation.perplexity import measure, together
from rwkv_train.inference.loading import find_meta, load_model, tokenizer_of
from rwkv_train.models import LanguageModel

_CONTEXT = 1024  # of weights that do not remember theirs


@dataclass(frozen=True)
class Wanted:
    """What is asked of `eval`.

    Args:
        data: stores, text files or directories, each as PATH or NAME=PATH; none, and no tasks either: what the
            checkpoint's run held out.
        tokenizer: None: the checkpoint's own.
        context: tokens of a window; None: the run's.
        tokens: at most so many of each source; None: all.
        batch: windows or requests at once.
        tasks, include, shots, limit: lm-eval's tasks, your folders of them, examples in a prompt, questions of a task.
        max_length: tokens that a prediction of a task may see; None: all.
        seed: of the draws of tasks that sample.
        as_json: print one JSON object and nothing else.
        out: a file for that object.
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

    def refuse_unusable(self) -> None:
        for name, least in (("context", 1), ("tokens", 1), ("batch", 1), ("shots", 0), ("limit", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is out of range", f"valid: {least} or more")
        if self.out is not None and not Path(self.out).absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: there is no directory for it", "make it, or give another place")
        if self.tasks and find_spec("lm_eval") is None:
            raise UserError("--tasks needs lm-eval, which is not installed", "pip install 'rwkv-train[eval]'")


def run(wanted: Wanted) -> int:
    """The command.

    Raises:
        UserError: whatever is not there, or does not fit the checkpoint.
    """
    wanted.refuse_unusable()
    checkpoint, names = Path(wanted.checkpoint), [name for word in wanted.tasks for name in word.split(",") if name]
    found_tasks = None
    if names:
        from rwkv_train.evaluation import harness

        found_tasks = harness.find_tasks(names, [Path(folder).expanduser() for folder in wanted.include])
    model = load_model(checkpoint, wanted.device)
    meta = find_meta(checkpoint)
    tokenizer = tokenizer_of(checkpoint, model.config.vocab_size, wanted.tokenizer)
    shape = model.config
    told: dict[str, Any] = {
        "checkpoint": wanted.checkpoint,
        "step": meta.get("step"),
        "model": {"arch": shape.arch, "n_layer": shape.n_layer, "n_embd": shape.n_embd, "vocab_size": shape.vocab_size},
        "tokenizer": tokenizer.identity,
    }
    sources = [] if names and not wanted.data else _sources(wanted, meta, tokenizer)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        if sources:
            told |= _perplexities(model, tokenizer, sources, wanted, meta, progress)
        if found_tasks is not None:
            lm = harness.Harness(model, tokenizer, wanted.batch, wanted.max_length, wanted.seed, progress)
            told["tasks"] = harness.run_tasks(lm, names, found_tasks, wanted.shots, wanted.limit)
    if wanted.out is not None:
        _write(Path(wanted.out), told)
    if wanted.as_json:
        print(json.dumps(told))
    else:
        _show(told)
    return 0


def _sources(wanted: Wanted, meta: Mapping[str, Any], tokenizer: Tokenizer) -> list[tuple[str, Store]]:
    """What is evaluated on, by name: the data that were named, or what the run held out."""
    if not wanted.data:
        return _held_out(wanted.checkpoint, meta)
    parts: list[SourceSettings] = []
    for word in wanted.data:
        name, named, path = word.partition("=")
        if not named or "/" in name:
            name, path = Path(word).stem or word, word
        if name in {part.name for part in parts}:
            raise UserError(f"--data {word}: there are two sources called {name}", "name them: --data NAME=PATH")
        parts.append(SourceSettings(name, path, None, None))
    data = DataSettings("mixture", None, tokenizer.name, 0.0, sources=tuple(parts))
    for part in parts:
        stem = Path(part.path).expanduser()
        if not stem.exists() and not stem.with_name(f"{stem.name}.idx").exists() and "*" not in part.path:
            raise UserError(f"--data {part.path}: there is neither a store nor text", "give a path that exists")
    for stems in stores_of(data):
        for stem in stems:
            manifest = read_manifest(stem)
            ours = tokenizer.identity
            if manifest is not None and manifest.identity not in (ours, ours.split("+")[0]):
                raise UserError(
                    f"--data {stem}: the store was made with the tokenizer {manifest.identity}, {wanted.checkpoint} "
                    f"was trained with {ours}",
                    "prepare the store with that tokenizer, or give the text itself",
                )
    extend = (meta.get("config") or {}).get("vocab", {}).get("extend", ())
    _, opened = open_sources(data, extend)
    short = next((source.name for source in opened if len(source.train) < 2), None)
    if short is not None:
        raise UserError(f"--data {short} has fewer than two tokens: there is nothing to predict")
    return [(source.name, source.train) for source in opened]


def _held_out(checkpoint: str, meta: Mapping[str, Any]) -> list[tuple[str, Store]]:
    try:
        config = from_tree(meta["config"])
        _, opened = open_sources(config.data, config.vocab.extend)
        held = [(source.name, source.held_out) for source in opened if len(source.held_out) > 1]
    except (UserError, KeyError) as error:
        why = f" ({error.what})" if isinstance(error, UserError) else ""
        raise UserError(
            f"{checkpoint} does not lead to the data that its run held out{why}",
            "--data names what to evaluate on: a store, a text file or a directory; or --tasks",
        ) from None
    if not held:
        raise UserError(f"the run of {checkpoint} held nothing out", "--data names what to evaluate on")
    return held


def _perplexities(
    model: LanguageModel,
    tokenizer: Tokenizer,
    sources: Sequence[tuple[str, Store]],
    wanted: Wanted,
    meta: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    config = meta.get("config") or {}
    of_run = (config.get("validation") or {}).get("context") or (config.get("batch") or {}).get("context")
    context, results = wanted.context or of_run or _CONTEXT, []
    for name, store in sources:
        total = min(len(store) - 1, wanted.tokens or len(store))
        bar = progress.add_task(name, total=total)
        results.append(
            measure(
                model,
                tokenizer,
                name,
                store,
                context,
                wanted.batch,
                wanted.tokens,
                lambda count, bar=bar: progress.advance(bar, count),  # type: ignore[misc]
            )
        )
    told = {"context": context, "sources": [result.as_json() for result in results]}
    return {**told, "all": together(results).as_json()}


def _write(path: Path, told: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}")
    try:
        aside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}", "give another place") from None


def _show(told: Mapping[str, Any]) -> None:
    """The figures for people."""
    console = Console(highlight=False)
    step = f", step {told['step']:,}" if told["step"] is not None else ""
    shape = told["model"]
    console.print(
        f"{told['checkpoint']}{step}: {shape['arch']} L{shape['n_layer']} C{shape['n_embd']} V{shape['vocab_size']}, "
        f"tokenizer {told['tokenizer']}",
        soft_wrap=True,
    )
    if "sources" in told:
        rows = told["sources"] if len(told["sources"]) == 1 else [*told["sources"], told["all"]]
        table = Table("source", *(_right(name) for name in ("tokens", "nats/token", "perplexity", "bits/byte")))
        for row in rows:
            tokens = f"{row['tokens']:,}" + (f" of {row['of_tokens']:,}" if row["tokens"] < row["of_tokens"] else "")
            table.add_row(
                row["name"],
                tokens,
                f"{row['nats_per_token']:.4f}",
                f"{row['perplexity']:,.3f}",
                f"{row['bits_per_byte']:.4f}",
            )
        console.print(table)
        table = Table(f"position (of {told['context']:,})", _right("nats/token"), _right("perplexity"))
        for row in told["all"]["by_position"]:
            place = f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,} – {row['to']:,}"
            loss = row["nats_per_token"]
            table.add_row(place, f"{loss:.4f}", f"{math.exp(min(loss, 700)):,.3f}")
        console.print(table)
    if "tasks" in told:
        table = Table("task", "metric", _right("value"))
        for name, metrics in told["tasks"].items():
            for metric, value in metrics.items():
                table.add_row(name, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
        console.print(table)


def _right(name: str) -> Column:
    return Column(name, justify="right")
