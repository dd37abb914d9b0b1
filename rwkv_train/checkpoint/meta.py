"""meta.json: what a checkpoint is a checkpoint of. Written and read here only; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rwkv_train.errors import UserError
from rwkv_train.json_files import load_object, reason_of

META = "meta.json"
_NONE = type(None)
_MAX_COUNT = 2**63 - 1
_MAX_WRITERS = 2**20


@dataclass(frozen=True)
class CheckpointMeta:
    """The description of a checkpoint.

    Attributes:
        step: optimiser steps done, those whose update was skipped included.
        tokens: tokens trained on so far.
        batches: (step, tokens) pairs: from that step on, each step has had so many tokens.
        updates: optimiser updates applied so far; fewer than `step` where some were skipped.
        probe: loss of one sample under the saved weights, in nats per token; None: that of no sample tried was
            finite, and no run resumes from the checkpoint; such a one is no longer written.
        probe_sample: number of that sample in the order of the data; the state file of rank 0 holds its tokens.
        data_tokens: tokens before the next sample in the order of the data, those passed over included.
        tokens_by_source: tokens of each source trained on so far, by its name.
        position: where a streamed source continues; None for sources that are addressed by step.
        val_loss: validation loss of these weights, in nats per token; None if they were not validated, or if it is not
            finite.
        shapes: the shape of each parameter by its name.
        writers: number of ranks that wrote files.
        config: the run's settled configuration, as a tree.
        data: content hash of the training data.
        tokenizer: identity of the tokenizer.
        versions: versions of rwkv_train, its source code, torch and Lightning.
    """

    step: int
    tokens: int
    batches: Sequence[tuple[int, int]]
    updates: int
    probe: float | None
    probe_sample: int
    data_tokens: int
    tokens_by_source: Mapping[str, int]
    position: dict[str, Any] | None
    val_loss: float | None
    shapes: Mapping[str, tuple[int, ...]]
    writers: int
    config: dict[str, Any]
    data: str
    tokenizer: str
    versions: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """The content of meta.json."""
        return asdict(self)

    @classmethod
    def read(cls, checkpoint: Path) -> CheckpointMeta:
        """Reads meta.json of a checkpoint directory.

        Raises:
            UserError: the file cannot be read, lacks a field, or has one of another type.
        """
        path = checkpoint / META
        remedy = f"use another checkpoint; init.weights={checkpoint}/weights.pth starts a new run from its weights"
        try:
            found = load_object(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__}: {reason_of(error)})", remedy) from None
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in found]:
            raise UserError(f"{path} lacks {', '.join(missing)}", remedy)
        for name in names:
            value, valid = found[name], _TYPES[name]
            if type(value) not in valid:
                wanted = " or ".join("null" if kind is _NONE else kind.__name__ for kind in valid)
                raise UserError(f"{path}: {name} is {value!r:.60}, not of type {wanted}", remedy)
            if not _in_range(name, value):
                raise UserError(f"{path}: {name} is {value!r:.60}, which is out of range", remedy)
        try:
            found["batches"] = tuple((_count(step), _count(tokens)) for step, tokens in found["batches"])
            found["shapes"] = {name: tuple(map(_count, shape)) for name, shape in found["shapes"].items()}
        except (TypeError, ValueError):
            raise UserError(f"{path}: batches or shapes are not lists of integers", remedy) from None
        try:
            found["tokens_by_source"] = {name: _count(tokens) for name, tokens in found["tokens_by_source"].items()}
        except ValueError:
            raise UserError(f"{path}: tokens_by_source does not hold counts of tokens", remedy) from None
        return cls(**{name: found[name] for name in names})


def _in_range(name: str, value: Any) -> bool:
    if type(value) is int:
        return int(name == "writers") <= value <= (_MAX_WRITERS if name == "writers" else _MAX_COUNT)
    return not isinstance(value, float) or math.isfinite(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise ValueError
    return value


_TYPES: Mapping[str, tuple[type, ...]] = {
    "step": (int,),
    "tokens": (int,),
    "batches": (list,),
    "updates": (int,),
    "probe": (float, _NONE),
    "probe_sample": (int,),
    "data_tokens": (int,),
    "tokens_by_source": (dict,),
    "position": (dict, _NONE),
    "val_loss": (float, _NONE),
    "shapes": (dict,),
    "writers": (int,),
    "config": (dict,),
    "data": (str,),
    "tokenizer": (str,),
    "versions": (dict,),
}
