"""Where a resumed run continues: its position in the data, and what may have changed since the save."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.config.clock import TokenClock
from rwkv_train.data.batches import Batches
from rwkv_train.data.course import Course

_DATA_CHANGES = ("data.", "vocab.", "seed:", "batch.context:", "the data itself:", "the tokenizer:")


def clock_of(meta: CheckpointMeta | None, tokens_per_step: int) -> TokenClock:
    """The clock of a run that resumes from a checkpoint, or begins, with a batch of so many tokens."""
    if meta is None:
        return TokenClock.resumed((), 0, tokens_per_step)
    return TokenClock.resumed(meta.batches, meta.step, tokens_per_step)


def continue_data(data: Batches, meta: CheckpointMeta | None, skips: Sequence[tuple[int, int]]) -> None:
    """Makes the data continue behind what a checkpoint has read; at the beginning where there is none.

    Another batch continues with the very next sample. Under another context, seed, share held out or other data, the
    order of the samples is another one; it is entered where as many tokens of it lie behind.

    Args:
        data: of the run.
        meta: of the checkpoint.
        skips: (first, end) of ranges of samples that are passed over.
    """
    each, skips = data.split.samples, tuple(skips)
    if meta is None:
        data.begin(0, None, Course(0, 0, each, skips))
        return
    data.round_stages(meta.batches[0][1])
    same = (meta.data, meta.tokenizer) == (data.digest, data.tokenizer.identity)
    course = Course(meta.step, -(-meta.data_tokens // data.context), each, skips)
    data.begin(meta.step, meta.position if same else None, course, meta.tokens_by_source)


def skipped_samples(skipped: Iterable[Sequence[int]], context: int) -> tuple[tuple[int, int], ...]:
    """The ranges (first, end) of samples that contain the ranges (first token, tokens) of the data's order."""
    return tuple((first // context, -(-(first + tokens) // context)) for first, tokens in skipped)


def is_same_data(changes: Iterable[str]) -> bool:
    """Whether a sample's number still means the same sample after these changes ("setting: before → after")."""
    return not any(change.startswith(_DATA_CHANGES) for change in changes)
