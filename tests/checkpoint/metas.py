"""Descriptions of checkpoints that tests write without a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rwkv_train.checkpoint.meta import CheckpointMeta

_PLAIN = CheckpointMeta(
    step=1,
    tokens=128,
    batches=((0, 128),),
    updates=1,
    probe=1.0,
    probe_sample=4,
    data_tokens=128,
    tokens_by_source={},
    position=None,
    val_loss=None,
    shapes={},
    writers=1,
    config={},
    data="0123456789abcdef",
    tokenizer="bytes",
    versions={},
)


def meta_of(**fields: Any) -> CheckpointMeta:
    """A description with these fields; the others have plain values."""
    return replace(_PLAIN, **fields)
