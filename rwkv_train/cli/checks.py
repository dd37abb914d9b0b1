"""Checks between several settings, and of settings against this machine; all that need no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rwkv_train.checkpoint.name import CheckpointName, complete_inside
from rwkv_train.cluster.rank_info import RankInfo, placement_errors
from rwkv_train.config import Config, DataSettings, TrainerSettings
from rwkv_train.config.mesh import Mesh
from rwkv_train.config.suggestions import suggestion
from rwkv_train.data.learned import learned_size
from rwkv_train.data.order import split_batch
from rwkv_train.data.sources import vocabulary_of
from rwkv_train.errors import UserError
from rwkv_train.json_files import parse_json, read_regular
from rwkv_train.planning.cards import find_card
from rwkv_train.rundir.replay_file import load_replay
from rwkv_train.user_path import is_utf8, user_path, utf8_path

_UNSUPPORTED_PRECISIONS = {  # first two characters of a precision of Lightning's → why it is refused
    "16": "float16 overflows in the channel mix (relu²)",
    "bf": "decay, bonus, mix and norm parameters must stay float32",
    "64": "the engines compute in float32; the float64 definition is for tests",
    "tr": "TransformerEngine has no RWKV operator",
}

_DERIVED_DEEPSPEED_KEYS = {  # keys of DeepSpeed's JSON → the settings that they are derived from
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

_MAX_NAME_BYTES = 200  # of a run: names of files are made of it

_DEEPSPEED_EXAMPLE = 'valid: an object such as {"zero_optimization": {…}}'


@dataclass(frozen=True)
class Machine:
    """The machine and this process, as the launcher sees them.

    Args:
        cores: CPU cores that this process may use.
        rank_info: of this process. Only rank 0 checks the run directory: rank 0 creates it, and the others see it.
    """

    cores: int
    rank_info: RankInfo = field(default_factory=RankInfo)


def check(config: Config, machine: Machine) -> list[UserError]:
    """Everything that is wrong with a config whose single values are valid."""
    return [
        *(() if config.dry_run else placement_errors(machine.rank_info, config.trainer, submits=bool(config.launcher))),
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
        name, needed = vocabulary_of(data, config.vocab.extend)
    except UserError as problem:
        yield problem
    else:
        if vocabulary is not None and vocabulary < needed:
            yield UserError(
                f"model.vocab_size={vocabulary} is smaller than the {needed} tokens of data.tokenizer={name}",
                f"model.vocab_size={needed}, or leave it out",
            )
        if config.init_weights is not None and learned_size(data.tokenizer) is not None:
            yield UserError(
                f"data.tokenizer={name} is learnt anew, and init.weights={config.init_weights} knows other tokens",
                "give the tokenizer of the weights: bytes, world, or data.tokenizer=RUN/tokenizer.json",
            )
    yield from _check_documents(config)
    if data.source == "mixture":
        yield from _check_mixture(data)
    elif data.path is None:
        if data.source != "stdlib":
            yield UserError("data.path is not given", _PATH_OF_SOURCE[data.source])
    elif data.source in ("stdlib", "text", "chat"):
        yield from _check_path(data, config.trainer)


_PATH_OF_SOURCE = {
    "text": "data.path=FILE or data.path=DIRECTORY of text files",
    "store": "data.path=STORE for STORE.bin and STORE.idx; `rwkv-train prepare` makes them",
    "chat": "data.path=FILE.jsonl with `messages` in each line",
    "stream": "data.path=FILES.jsonl (a glob), or the name of a data set on the hub",
}


def _check_documents(config: Config) -> Iterator[UserError]:
    data = config.data
    if data.reset and data.documents == "stream":
        yield UserError("data.reset=true needs packed documents", "data.documents=packed data.reset=true")
    if data.documents == "packed" and data.order == "reference":
        yield UserError("data.order=reference does not support data.documents=packed", "data.documents=stream")
    if data.source == "stream" and (data.documents == "packed" or data.order == "reference"):
        yield UserError(
            "data=stream is read in its own order, without packing",
            "make a store of it with `rwkv-train prepare`: data=store data.path=STORE",
        )
    if data.source == "chat" and data.documents != "packed":
        yield UserError("data=chat with data.documents=stream has no loss mask", "data.documents=packed")


def _check_mixture(data: DataSettings) -> Iterator[UserError]:
    names = [source.name for source in data.sources]
    if not names:
        yield UserError(
            "data.sources is empty", "data.sources=[{name:a,path:STORE_A,weight:0.7},{name:b,path:STORE_B}]"
        )
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield UserError(f"data.sources has the name {name} twice", "give each source its own name")
    tokens = [stage.tokens for stage in data.curriculum]
    if tokens != sorted(set(tokens)):
        yield UserError(f"data.curriculum: the stages begin at {tokens} tokens", "list them in ascending order")
    for stage in data.curriculum:
        for name, weight in stage.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
                yield UserError(
                    f"data.curriculum: the weight {weight} of {name} is not valid", "valid: a number, at least 0"
                )


def _check_path(data: DataSettings, trainer: TrainerSettings) -> Iterator[UserError]:
    assert data.path is not None
    path = user_path(data.path)
    try:
        if not path.exists():
            yield UserError(f"data.path={data.path}: there is no such file or directory", _relative_to())
        elif path.is_dir() and next(path.iterdir(), None) is None:
            yield UserError(f"data.path={data.path} is an empty directory", "name a directory of text files")
        elif not path.is_file() and not path.is_dir() and (trainer.devices != 1 or trainer.node_count != 1):
            yield UserError(
                f"data.path={data.path} is no file: it can be read once, by one process",
                "write it to a file and give that, or trainer.devices=1",
            )
        elif path.is_file() and path.stat().st_size == 0:
            yield UserError(f"data.path={data.path} is an empty file", "name a text file")
    except OSError as error:
        yield UserError(f"data.path={data.path} cannot be read: {error.strerror}", "fix its permissions")


def _relative_to() -> str:
    return f"relative paths are resolved against {os.getcwd()}"


def _check_batch(config: Config, machine: Machine) -> Iterator[UserError]:
    trainer, batch = config.trainer, config.batch
    if trainer.precision not in ("auto", "32-true", "bf16-mixed"):
        reason = _UNSUPPORTED_PRECISIONS.get(trainer.precision[:2], "there is no such precision")
        if trainer.precision in ("32", "bf16"):
            reason = "the name is abbreviated"
        yield UserError(f"trainer.precision={trainer.precision}: {reason}", "valid: auto, 32-true, bf16-mixed")
    if trainer.devices == "auto" and trainer.accelerator != "cpu":
        return  # only torch knows how many there are; training/setup.py checks them
    devices = 1 if trainer.devices == "auto" else trainer.devices
    if trainer.accelerator == "cpu" and devices > machine.cores and not config.dry_run:
        yield UserError(
            f"trainer.devices={devices}: this machine has {machine.cores} CPU cores", f"trainer.devices={machine.cores}"
        )
        return
    try:
        split_batch(batch.tokens, batch.context, batch.micro, Mesh(devices * trainer.node_count))
    except UserError as problem:
        yield problem


def _check_strategy(config: Config) -> Iterator[UserError]:
    name = config.strategy
    if config.device is not None:
        try:
            find_card(config.device)
        except UserError as problem:
            yield problem
    if config.compile and name not in ("auto", "ddp"):
        yield UserError(f"compile=true does not support strategy={name}, which shards the parameters", "compile=false")
    if config.deepspeed is not None:
        yield from _check_deepspeed(config.deepspeed, name)


def _check_deepspeed(file: str, strategy: str) -> Iterator[UserError]:
    """A JSON file for DeepSpeed may add to the derived configuration, but not contradict it."""
    if not strategy.startswith("deepspeed"):
        yield UserError(f"deepspeed={file} has no effect with strategy={strategy}", "e.g. strategy=deepspeed_2")
    try:
        given = parse_json(read_regular(user_path(file)))
    except OSError as error:
        yield UserError(f"deepspeed={file} cannot be read: {error.strerror}", _relative_to())
        return
    except ValueError as error:
        yield UserError(f"deepspeed={file} is not JSON: {error}", _DEEPSPEED_EXAMPLE)
        return
    if not isinstance(given, dict):
        yield UserError(f"deepspeed={file} does not hold a JSON object", _DEEPSPEED_EXAMPLE)
        return
    zero = given.get("zero_optimization")
    keys = [*given, *(["zero_optimization.stage"] if isinstance(zero, dict) and "stage" in zero else [])]
    for key in keys:
        if key in _DERIVED_DEEPSPEED_KEYS:
            yield UserError(
                f"deepspeed={file} sets {key}, which is derived from other settings",
                f"remove it, and use {_DERIVED_DEEPSPEED_KEYS[key]}",
            )


def _check_schedule(config: Config) -> Iterator[UserError]:
    budget, optim = config.budget, config.optim
    schedule = optim.schedule
    if budget.total is None and budget.hours is None:
        yield UserError("no training budget is set", "budget.steps=…, budget.tokens=… or budget.hours=…")
    if budget.total is None and schedule.shape != "constant":
        yield UserError(
            f"optim.schedule.shape={schedule.shape} needs the length of the run",
            "budget.steps=… or budget.tokens=…, or optim.schedule.shape=constant",
        )
    if schedule.shape == "exponential" and optim.final_lr == 0:
        yield UserError(
            "optim.final_lr=0: an exponential decay never reaches 0", "optim.final_lr above 0, or another shape"
        )
    if optim.final_lr > optim.lr:
        yield UserError(
            f"optim.final_lr={optim.final_lr:g} is above optim.lr={optim.lr:g}, from which the rate decays to it",
            f"optim.final_lr={optim.lr:g} or less",
        )
    for rule in optim.rules:
        try:
            re.compile(rule.pattern)
        except re.error as error:
            yield UserError(f"optim.rules: {rule.pattern!r} is not a regular expression: {error}", "e.g. .*key.weight")


def _check_logger(config: Config) -> Iterator[UserError]:
    for name, tree in config.logger.items():
        target = str(tree.get("_target_", "")) if isinstance(tree, dict) else ""
        for kind, package in (("Wandb", "wandb"), ("TensorBoard", "tensorboard")):
            if target == f"rwkv_train.trackers.{package}.{kind}" and find_spec(package) is None:
                yield UserError(f"logger={name} needs {package}, which is not installed", f"pip install {package}")


def _check_callbacks(config: Config) -> Iterator[UserError]:
    """Lightning reports an unknown metric only at the first validation, with a traceback."""
    known = ["val/loss", *(f"val/loss/{source.name}" for source in config.data.sources)]
    for name, tree in config.callbacks.items():
        metric = tree.get("monitor") if isinstance(tree, dict) else None
        if metric is not None and metric not in known:
            yield UserError(
                f"callbacks.{name}.monitor={metric}: there is no such metric", suggestion(str(metric), known)
            )


def _check_replay(config: Config) -> Iterator[UserError]:
    if config.replay is None:
        return
    try:
        checkpoint = load_replay(user_path(config.replay))["checkpoint"]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a replay file"
        yield UserError(
            f"replay={config.replay} cannot be read: {reason}", "give a file like RUN/replay/step_000001234.json"
        )
        return
    if checkpoint is not None and not Path(checkpoint).exists():
        yield UserError(
            f"replay={config.replay} starts from {checkpoint}, which does not exist any more",
            "resume=CHECKPOINT with an older checkpoint of the run reaches that step as well",
        )


def _check_run(config: Config, machine: Machine) -> Iterator[UserError]:
    run, resume = config.run, config.resume
    if not re.fullmatch(r"[^\s=,{}\[\]/\\]+", run.name) or run.name in (".", ".."):
        yield UserError(
            f"run.name={run.name!r} is not valid", "valid: a name without spaces and without any of = , { } [ ] / \\"
        )
    if len(os.fsencode(run.name)) > _MAX_NAME_BYTES or not is_utf8(run.name):
        what = f"has {len(os.fsencode(run.name))} bytes" if is_utf8(run.name) else "is not UTF-8"
        yield UserError(f"run.name={run.name[:60]} {what}", f"give a name in UTF-8 of up to {_MAX_NAME_BYTES} bytes")
        return
    directory = utf8_path(run.root) / run.name
    held = any((directory / name).exists() for name in ("config.yaml", "metrics.jsonl"))
    if resume == "never" and machine.rank_info.first and held:
        yield UserError(
            f"resume=never, but {run.root}/{run.name} holds a run",
            "run.name=NAME for another directory, or resume=auto to continue it",
        )
    if resume not in ("auto", "never"):
        yield from _check_checkpoint(resume, user_path(resume))
    weights = config.init_weights
    if weights is not None and not user_path(weights).exists():
        yield UserError(
            f"init.weights={weights}: there is no such file", "give a .pth file, a checkpoint or a run directory"
        )


def _check_checkpoint(resume: str, path: Path) -> Iterator[UserError]:
    """Checks that need no torch; checkpoint/directory.py checks the content."""
    if not path.exists():
        yield UserError(
            f"resume={resume}: there is no such checkpoint", "valid: auto, never, or the path of a checkpoint"
        )
    elif path.is_file():
        yield UserError(
            f"resume={resume} is a file, but a checkpoint is a directory",
            f"init.weights={resume} starts a new run from weights",
        )
    elif not (path / "manifest.json").exists():
        inside = complete_inside(path)
        yield UserError(
            f"resume={resume} is not a complete checkpoint: it has no manifest.json",
            f"resume={inside[-1]}" if inside else f"give a directory like RUN/checkpoints/{CheckpointName(1000, 1)}",
        )
