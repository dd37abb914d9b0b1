"""What must hold between several settings, and between a setting and this machine; everything that needs no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.cluster.rank_info import RankInfo, mistakes
from rwkv_train.config import Config, DataSettings
from rwkv_train.config.schema import nearest
from rwkv_train.data.order import split_batch
from rwkv_train.data.sources import find_tokenizer, stores_of
from rwkv_train.errors import UserError
from rwkv_train.planning.cards import find_card

_PRECISION = {  # why a precision of Lightning's is refused
    "16": "float16 overflows in the channel mix (relu²)",
    "bf": "decay, bonus, mix and norm parameters must stay float32",
    "64": "the engines compute in float32; the float64 definition is for tests",
    "tr": "TransformerEngine has no RWKV operator",
}

_DERIVED = {  # words of DeepSpeed's JSON, and where they come from here
    "train_batch_size": "batch.tokens=",
    "train_micro_batch_size_per_gpu": "batch.micro=",
    "gradient_accumulation_steps": "batch.tokens= and batch.micro=",
    "gradient_clipping": "optim.clip=",
    "optimizer": "optim=",
    "scheduler": "optim.schedule.shape=",
    "bf16": "trainer.precision=bf16-mixed",
    "fp16": "trainer.precision=",
    "torch_autocast": "trainer.precision=bf16-mixed",
    "zero_optimization.stage": "strategy=",
}


@dataclass(frozen=True)
class Machine:
    """What the launcher knows of the place where this process runs."""

    cores: int
    rank_info: RankInfo = field(
        default_factory=RankInfo
    )  # only the first reports: the others see what the first has made


def check(config: Config, machine: Machine) -> list[UserError]:
    """Everything that is wrong with a config whose single values are right."""
    return [
        *(() if config.dry_run else mistakes(machine.rank_info, config.trainer)),
        *_check_data(config),
        *_check_batch(config, machine),
        *_check_strategy(config),
        *_check_schedule(config),
        *_check_logger(config),
        *_check_callbacks(config),
        *_check_replay(config),
        *_check_run(config, machine),
    ]


def _check_data(config: Config) -> Iterator[UserError]:
    vocabulary, data = config.model.vocab_size, config.data
    try:
        tokenizer = find_tokenizer(data, config.vocab.extend, stores_of(data))
    except UserError as problem:
        yield problem
    else:
        needed = tokenizer.vocab_size
        if vocabulary is not None and vocabulary < needed:
            yield UserError(
                f"model.vocab_size={vocabulary} is smaller than the {needed} tokens of data.tokenizer={tokenizer.name}",
                f"model.vocab_size={needed}, or leave it out",
            )
    yield from _check_documents(config)
    if data.source == "mixture":
        yield from _check_mixture(data)
    elif data.path is None:
        if data.source != "stdlib":
            yield UserError("data.path is not given", _PATHS[data.source])
    elif data.source in ("stdlib", "text", "chat"):
        yield from _check_path(data)


_PATHS = {
    "text": "data.path=FILE or data.path=DIRECTORY of text files",
    "store": "data.path=STORE for STORE.bin and STORE.idx; `rwkv-train prepare` makes them",
    "chat": "data.path=FILE.jsonl with `messages` in each line",
    "stream": "data.path=FILES.jsonl (a glob), or the name of a data set on the hub",
}


def _check_documents(config: Config) -> Iterator[UserError]:
    data = config.data
    if data.reset and data.documents == "stream":
        yield UserError("data.reset=true without packed documents", "data.documents=packed data.reset=true")
    if data.documents == "packed" and data.order == "reference":
        yield UserError("data.order=reference walks through the stream of tokens", "data.documents=stream")
    if data.source == "stream" and (data.documents == "packed" or data.order == "reference"):
        yield UserError(
            "data=stream is read in its own order, as one stream of tokens",
            "`rwkv-train prepare` makes a store of it: data=store data.path=STORE",
        )
    if data.source == "chat" and data.documents != "packed":
        yield UserError("data=chat with data.documents=stream would lose its mask", "data.documents=packed")


def _check_mixture(data: DataSettings) -> Iterator[UserError]:
    names = [source.name for source in data.sources]
    if not names:
        yield UserError(
            "data.sources is empty", "data.sources=[{name:a,path:STORE_A,weight:0.7},{name:b,path:STORE_B}]"
        )
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield UserError(f"data.sources has the name {name} twice", "give each source a name of its own")
    tokens = [stage.tokens for stage in data.curriculum]
    if tokens != sorted(set(tokens)):
        yield UserError(f"data.curriculum begins at the tokens {tokens}", "stages in rising order")
    for stage in data.curriculum:
        for name, weight in stage.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
                yield UserError(
                    f"data.curriculum: the weight {weight} of {name} is not valid", "valid: a number from 0 on"
                )


def _check_path(data: DataSettings) -> Iterator[UserError]:
    assert data.path is not None
    path = Path(data.path).expanduser()
    try:
        if not path.exists():
            yield UserError(
                f"data.path={data.path}: there is no such file or directory", "it is taken from " + os.getcwd()
            )
        elif path.is_dir() and next(path.iterdir(), None) is None:
            yield UserError(f"data.path={data.path} is an empty directory", "name a directory of text files")
        elif path.is_file() and path.stat().st_size == 0:
            yield UserError(f"data.path={data.path} is an empty file", "name a text file")
    except OSError as error:
        yield UserError(f"data.path={data.path} cannot be read: {error.strerror}", "mend its permissions, or move it")


def _check_batch(config: Config, machine: Machine) -> Iterator[UserError]:
    trainer, batch = config.trainer, config.batch
    if trainer.precision not in ("auto", "32-true", "bf16-mixed"):
        reason = _PRECISION.get(trainer.precision[:2], "it is none of Lightning's")
        if trainer.precision in ("32", "bf16"):
            reason = "the full name is asked for"
        yield UserError(f"trainer.precision={trainer.precision}: {reason}", "valid: auto, 32-true, bf16-mixed")
    if trainer.devices == "auto" and trainer.accelerator != "cpu":
        return  # how many there are is known to torch only; training/run.py asks again
    devices = 1 if trainer.devices == "auto" else trainer.devices
    if trainer.accelerator == "cpu" and devices > machine.cores and not config.dry_run:
        yield UserError(
            f"trainer.devices={devices}: this machine has {machine.cores} CPU cores", f"trainer.devices={machine.cores}"
        )
        return
    try:
        split_batch(batch.tokens, batch.context, batch.micro, devices * trainer.machines)
    except UserError as problem:
        yield problem


def _check_strategy(config: Config) -> Iterator[UserError]:
    """A JSON for DeepSpeed may add to what is derived from the other settings, and not contradict it."""
    name, file = config.strategy, config.deepspeed
    if config.device is not None:
        try:
            find_card(config.device)
        except UserError as problem:
            yield problem
    if config.compile and name not in ("auto", "ddp"):
        yield UserError(f"compile=true with strategy={name}: its parameters are not there as a whole", "compile=false")
    if file is None:
        return
    if not name.startswith("deepspeed"):
        yield UserError(
            f"deepspeed={file} with strategy={name}: nothing reads it", "strategy=deepspeed_2, for instance"
        )
    try:
        given = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        yield UserError(f"deepspeed={file} cannot be read: {error.strerror}", "it is taken from " + os.getcwd())
        return
    except ValueError as error:
        yield UserError(f"deepspeed={file} is no JSON: {error}", 'an object such as {"zero_optimization": {…}}')
        return
    if not isinstance(given, dict):
        yield UserError(f"deepspeed={file} holds no JSON object", 'an object such as {"zero_optimization": {…}}')
        return
    zero = given.get("zero_optimization")
    words = [*given, *(["zero_optimization.stage"] if isinstance(zero, dict) and "stage" in zero else [])]
    for word in words:
        if word in _DERIVED:
            yield UserError(f"deepspeed={file} sets {word}, which is derived", f"say it as {_DERIVED[word]}")


def _check_schedule(config: Config) -> Iterator[UserError]:
    budget, optim, batch = config.budget, config.optim, config.batch
    schedule = optim.schedule
    if budget.total is None and budget.hours is None:
        yield UserError("the run has no end", "budget.steps=…, budget.tokens=… or budget.hours=…")
    if budget.total is None and schedule.shape != "constant":
        yield UserError(
            f"optim.schedule.shape={schedule.shape} needs the length of the run",
            "budget.steps=… or budget.tokens=…, or optim.schedule.shape=constant",
        )
    spans = {
        "budget": budget.total,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.permanent": config.checkpoint.permanent,
        "validation.every": config.validation.every,
        "statistics.every": config.statistics.every,
    }
    for name, span in spans.items():
        if span is not None and span.in_steps(batch.tokens) == 0:
            yield UserError(f"{name}.{'tokens' if span.steps is None else 'steps'}=0 is not valid", "valid: at least 1")
    if schedule.shape == "exponential" and optim.final_lr == 0:
        yield UserError("optim.final_lr=0: an exponential decay never gets to 0", "give one above 0, or another shape")
    if optim.final_lr > optim.lr:
        yield UserError(
            f"optim.final_lr={optim.final_lr:g} is above optim.lr={optim.lr:g}", "it is where the decay ends"
        )
    for rule in optim.rules:
        try:
            re.compile(rule.pattern)
        except re.error as error:
            yield UserError(f"optim.rules: {rule.pattern!r} is no regular expression: {error}", "e.g. .*time_decay")


def _check_logger(config: Config) -> Iterator[UserError]:
    for name, tree in config.logger.items():
        target = str(tree.get("_target_", "")) if isinstance(tree, dict) else ""
        for kind, package in (("Wandb", "wandb"), ("TensorBoard", "tensorboard")):
            if target == f"rwkv_train.trackers.{package}.{kind}" and find_spec(package) is None:
                yield UserError(f"logger={name} needs {package}, which is not installed", f"pip install {package}")


def _check_callbacks(config: Config) -> Iterator[UserError]:
    """Lightning would tell an unknown metric at the first validation, with a traceback."""
    known = ["val/loss", *(f"val/loss/{source.name}" for source in config.data.sources)]
    for name, tree in config.callbacks.items():
        metric = tree.get("monitor") if isinstance(tree, dict) else None
        if metric is not None and metric not in known:
            near = nearest(str(metric), known)
            yield UserError(
                f"callbacks.{name}.monitor={metric}: there is no such metric",
                (f"nearest: {near}; " if near else "") + f"valid: {', '.join(known)}",
            )


def _check_replay(config: Config) -> Iterator[UserError]:
    if config.replay is None:
        return
    try:
        told = json.loads(Path(config.replay).expanduser().read_text(encoding="utf-8"))
        checkpoint = (told["step"], told["config"], told["samples"], told["checkpoint"])[-1]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "it was not written by a bad step"
        yield UserError(
            f"replay={config.replay} cannot be read: {reason}", "a file like RUN/replay/step_000001234.json"
        )
        return
    if checkpoint is not None and not Path(checkpoint).exists():
        yield UserError(
            f"replay={config.replay} starts from {checkpoint}, which is gone",
            "an older checkpoint of the run as resume=CHECKPOINT comes to that step as well",
        )


def _check_run(config: Config, machine: Machine) -> Iterator[UserError]:
    run, resume = config.run, config.resume
    if not re.fullmatch(r"[^\s=,{}\[\]/\\]+", run.name) or run.name in (".", ".."):
        yield UserError(
            f"run.name={run.name!r} is not valid", "a name without blanks and without any of = , { } [ ] / \\"
        )
    if resume == "never" and machine.rank_info.first and holds_run(Path(run.root).expanduser() / run.name):
        yield UserError(
            f"resume=never, but {run.root}/{run.name} holds a run",
            "run.name=NAME for another directory, or resume=auto to go on with it",
        )
    if resume not in ("auto", "never"):
        yield from _check_checkpoint(resume, Path(resume).expanduser())
    weights = config.init_weights
    if weights is not None and not Path(weights).expanduser().exists():
        yield UserError(f"init.weights={weights}: there is no such file", "a .pth file or a checkpoint directory")


def _check_checkpoint(resume: str, path: Path) -> Iterator[UserError]:
    """What can be seen of a checkpoint from outside; training/setup.py reads it."""
    if not path.exists():
        yield UserError(
            f"resume={resume}: there is no such checkpoint", "valid: auto, never, or the path of a checkpoint"
        )
    elif path.is_file():
        yield UserError(
            f"resume={resume} is a file, and a checkpoint is a directory",
            f"init.weights={resume} starts a new run from weights",
        )
    elif not (path / "manifest.json").exists():
        inside = sorted(
            file.parent for file in [*path.glob("*/manifest.json"), *path.glob("checkpoints/*/manifest.json")]
        )
        yield UserError(
            f"resume={resume} is no whole checkpoint: it has no manifest.json",
            f"resume={inside[-1]}"
            if inside
            else f"a checkpoint is a directory like RUN/checkpoints/{CheckpointName(1000, 1)}",
        )


def holds_run(directory: Path) -> bool:
    """Whether a run was begun in that directory."""
    return any((directory / name).exists() for name in ("config.yaml", "metrics.jsonl"))
