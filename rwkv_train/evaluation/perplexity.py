"""Perplexity and bits per byte of a model on tokens: in all, by source, and by position in the context.

A source is cut into windows of the context's length, one behind the other, each read as a fresh text; every token but
the first is predicted once. The loss by position shows whether the model uses what is far: it falls as long as more
context helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rwkv_train.data.rows import IGNORED
from rwkv_train.data.store import Store
from rwkv_train.data.tokenizers import Tokenizer
from rwkv_train.evaluation.scoring import score
from rwkv_train.models import LanguageModel


@dataclass(frozen=True)
class Result:
    """What a source costs.

    Attributes:
        available: tokens that there are to predict.
        tokens: that were predicted.
        bytes: that these stand for; an end-of-text counts as one.
        nats: of all of them.
        positions: nats of the tokens at each position of the window (T,), the first one's is the first.
        counts: how many tokens stood at each position (T,).
    """

    name: str
    available: int
    tokens: int
    bytes: int
    nats: float
    positions: np.ndarray[Any, np.dtype[np.float64]]
    counts: np.ndarray[Any, np.dtype[np.int64]]

    def as_json(self) -> dict[str, Any]:
        """The figures as they are written: nats/token, perplexity, bits/byte, and the loss by position."""
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
    """Mean nats/token of the positions 1, 2, 3–4, 5–8 and so on: the tokens of context that a prediction has."""
    first = 0
    while first < len(counts):
        last = min(len(counts), max(1, 2 * first))
        count = int(counts[first:last].sum())
        if count:
            mean = float(nats[first:last].sum()) / count
            yield {"from": first + 1, "to": last, "tokens": count, "nats_per_token": mean}
        first = last


def together(results: Sequence[Result]) -> Result:
    """Several sources as one."""
    return Result(
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
    told: Callable[[int], None] | None = None,
) -> Result:
    """Scores the tokens of a store.

    Args:
        name: of the source.
        store: at least two tokens.
        context: tokens of a window.
        batch: windows that are read at once.
        limit: at most so many tokens (whole windows), taken evenly from the whole store; None: all.
        told: is called with the number of tokens that were scored since it was called last.
    """
    available = len(store) - 1
    windows = -(-available // context)
    chosen = windows if limit is None else min(windows, max(1, limit // context))
    places = np.arange(chosen) * windows // chosen  # all of them, or evenly spread ones
    nats, counts = np.zeros(context), np.zeros(context, np.int64)
    bytes_ = 0
    for first in range(0, chosen, batch):
        rows = places[first : first + batch]
        tokens = np.zeros((len(rows), context), np.int64)
        targets = np.full((len(rows), context), IGNORED, np.int64)
        for row, place in enumerate(rows):
            begin = int(place) * context
            window = np.empty(min(context, available - begin) + 1, np.int64)
            store.read(begin, window)
            tokens[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
        device = model.emb.weight.device
        scores, _ = score(model, torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device))
        predicted = targets != IGNORED
        nats += scores.nats.double().sum(0).cpu().numpy()
        counts += predicted.sum(0)
        text = targets[predicted]
        ends = text == tokenizer.end_of_text
        bytes_ += len(tokenizer.decode(text[~ends])) + int(ends.sum())
        if told is not None:
            told(int(predicted.sum()))
    return Result(name, available, int(counts.sum()), max(1, bytes_), float(nats.sum()), nats, counts)
