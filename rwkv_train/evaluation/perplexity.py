"""Perplexity and bits per byte of a model on token stores: by source, combined, and by position in the context.

A store is cut into consecutive windows of the context length, each read as a new text; every token but the first is
predicted once. The held-out data of a run is read in the rows of its validation. The loss by position shows how much
context the model uses: it falls as long as more context helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_train.data.arrays import Ints
from rwkv_train.data.batch import Batch
from rwkv_train.data.bits_per_byte import bits_per_byte, token_bytes
from rwkv_train.data.rows import IGNORED_TARGET, SequentialWindows, read_rows
from rwkv_train.data.store import Store
from rwkv_train.data.tokenizers import Tokenizer
from rwkv_train.evaluation.scoring import score
from rwkv_train.models import LanguageModel


@dataclass(frozen=True)
class PerplexityResult:
    """The loss on one source, or on several combined.

    Attributes:
        name: name of the source.
        available: number of tokens that could be predicted.
        tokens: number of tokens that were predicted.
        bytes: bytes of the predicted tokens' text, as `token_bytes` counts them.
        nats: sum of the losses of the predicted tokens.
        positions: sum of the losses at each position of the window, in nats, float64 (T,).
        counts: number of predicted tokens at each position of the window, int64 (T,).
    """

    name: str
    available: int
    tokens: int
    bytes: int
    nats: float
    positions: np.ndarray[Any, np.dtype[np.float64]]
    counts: np.ndarray[Any, np.dtype[np.int64]]

    def as_json(self) -> dict[str, Any]:
        """The figures for eval.json: nats per token, perplexity, bits per byte, and the loss by position."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "of_tokens": self.available,
            "bytes": self.bytes,
            "nats_per_token": self.nats / self.tokens,
            "perplexity": math.exp(min(700.0, self.nats / self.tokens)),
            "bits_per_byte": bits_per_byte(self.nats, self.bytes),
            "by_position": list(by_position(self.positions, self.counts)),
        }


def by_position(
    nats: np.ndarray[Any, np.dtype[np.float64]], counts: np.ndarray[Any, np.dtype[np.int64]]
) -> Iterator[dict[str, Any]]:
    """Yields the mean loss of positions 1, 2, 3–4, 5–8, …; a position is the number of context tokens of a prediction.

    Args:
        nats: sum of the losses at each position, (T,).
        counts: number of predictions at each position, (T,).
    """
    first = 0
    while first < len(counts):
        last = min(len(counts), max(1, 2 * first))
        count = int(counts[first:last].sum())
        if count:
            mean = float(nats[first:last].sum()) / count
            yield {"from": first + 1, "to": last, "tokens": count, "nats_per_token": mean}
        first = last


def combine(results: Sequence[PerplexityResult]) -> PerplexityResult:
    """Several sources combined into one result."""
    return PerplexityResult(
        "all",
        sum(result.available for result in results),
        sum(result.tokens for result in results),
        sum(result.bytes for result in results),
        sum(result.nats for result in results),
        np.sum([result.positions for result in results], axis=0),
        np.sum([result.counts for result in results], axis=0),
    )


def measure(
    model: LanguageModel,
    tokenizer: Tokenizer,
    name: str,
    store: Store,
    context: int,
    batch: int,
    limit: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Scores the tokens of a store, in consecutive windows.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: that made the tokens; for the bytes per token.
        name: name of the source.
        store: tokens, at least two.
        context: tokens of a window.
        batch: windows read at once.
        limit: maximum number of tokens; None: all. See `within`.
        on_progress: called with the number of tokens scored since its last call.
    """
    windows = SequentialWindows(store, context, tokenizer.end_of_text)
    numbers, positions = within(np.arange(windows.per_epoch), context, limit)
    zeros = np.zeros_like(numbers)

    def read(part: Ints) -> Batch:
        return Batch.of(read_rows([windows], zeros[: len(part)], part, context, False), part, zeros[: len(part)])

    table = token_bytes(tokenizer, model.config.vocab_size)
    batches = (cut(read(numbers[first : first + batch]), positions) for first in range(0, len(numbers), batch))
    return measure_batches(model, table, name, batches, context, len(store) - 1, on_progress)


def within(numbers: Ints, context: int, limit: int | None) -> tuple[Ints, int]:
    """The rows to score where at most `limit` tokens may be scored.

    Args:
        numbers: (N,) of all rows.
        context: tokens of a row.
        limit: maximum number of tokens; None: all.

    Returns:
        Complete rows, spread evenly over `numbers`, and the number of their positions that are scored: all of them, or
        `limit` in a single row where a complete one has more.
    """
    if limit is None:
        return numbers, context
    chosen = min(len(numbers), max(1, limit // context))
    return numbers[np.arange(chosen) * len(numbers) // max(1, chosen)], min(context, limit)


def cut(batch: Batch, positions: int) -> Batch:
    """A batch whose targets after the first `positions` of each row are ignored."""
    batch.targets[:, positions:] = IGNORED_TARGET
    return batch


def measure_batches(
    model: LanguageModel,
    table: Ints,
    name: str,
    batches: Iterable[Batch],
    context: int,
    available: int,
    on_progress: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Scores the targets of batches.

    Args:
        model: in evaluation mode, on any device.
        table: bytes that each token counts as, (V,).
        name: name of the source.
        batches: on the host.
        context: tokens of a row.
        available: number of tokens of the source that could be predicted.
        on_progress: called with the number of tokens scored since its last call.
    """
    nats, counts, text_bytes = np.zeros(context), np.zeros(context, np.int64), 0
    device = model.emb.weight.device
    for batch in batches:
        starts = None if batch.starts is None else batch.starts.to(device)
        scores, _ = score(model, batch.tokens.to(device), batch.targets.to(device), starts=starts)
        targets = batch.targets.numpy()
        predicted = targets != IGNORED_TARGET
        where = _positions(batch)[predicted]
        nats += np.bincount(where, scores.nats.double().cpu().numpy()[predicted], context)
        counts += np.bincount(where, minlength=context)
        text_bytes += int(table[targets[predicted]].sum())
        if on_progress is not None:
            on_progress(int(predicted.sum()))
    return PerplexityResult(name, available, int(counts.sum()), text_bytes, float(nats.sum()), nats, counts)


def _positions(batch: Batch) -> Ints:
    """How many tokens a prediction sees beside the last one, (B, T): those since the document's start, or the row's."""
    index = np.broadcast_to(np.arange(batch.tokens.shape[1]), batch.tokens.shape)
    if batch.starts is None:
        return index
    return index - np.maximum.accumulate(np.where(batch.starts.numpy(), index, 0), axis=1)
