"""Perplexity and bits per byte of a model on token stores: by source, combined, and by position in the context.

A source is cut into consecutive windows of the context length, each read as a new text; every token but the first is
predicted once. The loss by position shows how much context the model uses: it falls as long as more context helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rwkv_train.data.rows import IGNORED_TARGET
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
        bytes: bytes of the predicted tokens; an end-of-text counts as one.
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
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
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
    """Scores the tokens of a store.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: that made the tokens; for the bytes per token.
        name: name of the source.
        store: tokens, at least two.
        context: tokens of a window.
        batch: windows read at once.
        limit: maximum number of tokens, in complete windows spread evenly over the store; None: all.
        on_progress: called with the number of tokens scored since its last call.
    """
    available = len(store) - 1
    windows = -(-available // context)
    chosen = windows if limit is None else min(windows, max(1, limit // context))
    numbers = np.arange(chosen) * windows // chosen  # evenly spread over the store
    nats, counts = np.zeros(context), np.zeros(context, np.int64)
    bytes_ = 0
    for first in range(0, chosen, batch):
        rows = numbers[first : first + batch]
        tokens = np.zeros((len(rows), context), np.int64)
        targets = np.full((len(rows), context), IGNORED_TARGET, np.int64)
        for row, number in enumerate(rows):
            begin = int(number) * context
            window = np.empty(min(context, available - begin) + 1, np.int64)
            store.read(begin, window)
            tokens[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
        device = model.emb.weight.device
        scores, _ = score(model, torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device))
        predicted = targets != IGNORED_TARGET
        nats += scores.nats.double().sum(0).cpu().numpy()
        counts += predicted.sum(0)
        text = targets[predicted]
        ends = text == tokenizer.end_of_text
        bytes_ += len(tokenizer.decode(text[~ends])) + int(ends.sum())
        if on_progress is not None:
            on_progress(int(predicted.sum()))
    return PerplexityResult(name, available, int(counts.sum()), max(1, bytes_), float(nats.sum()), nats, counts)
