"""Batches: what every rank gets in every pass of every step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rwkv_train.config import BatchSettings, DataSettings
from rwkv_train.data.corpus import join, read_corpus
from rwkv_train.data.order import Ints, Order, split_batch
from rwkv_train.data.store import MemoryStore
from rwkv_train.data.tokenizers import load_tokenizer

Batch = tuple[Tensor, Tensor]  # tokens and targets, each (B, T) int64

AHEAD = 64  # steps whose order is worked out at once
IGNORED = -100  # the target of what is no prediction: torch's own default


class Batches:
    """Reads the text, and gives the batches of training and validation.

    The batches are made in the training process: reading a window from memory takes less time than handing it over from
    another process would.

    Args:
        data: which text, which tokenizer, what share is held out.
        batch: global batch, context and micro-batch.
        seed: of the order.
        world_size: number of devices; DataModule checks that the trainer has as many.
        validation_batches: at most so many batches per device in a validation, spread evenly over the held-out text;
            None: all of it.
        validation_context: tokens of one window of held-out text; None: batch.context.

    Attributes:
        tokenizer: between bytes and tokens; vocab_size is its.
        largest_token: the largest one in the text; the model's vocabulary must hold it.
        train, held_out: the two streams of tokens; an end-of-text stands before each document.
        description: one line for people: root, files, bytes, hash, what is held out, what was skipped.
        digest: hash of the text and its split, 16 hexadecimal digits.
        bytes_per_token: of the held-out text (of the training text if none is), an end-of-text counted as one byte.
        micro, accumulation: samples of a pass on one device; passes of a step.
        start_step: the step that training() begins with; set it before fit() to resume.
        rank: which device this process drives; DataModule sets it.

    Raises:
        UserError: no text there, fewer tokens than one sample, or a batch that cannot be shared out.
    """

    def __init__(
        self,
        data: DataSettings,
        batch: BatchSettings,
        seed: int,
        world_size: int = 1,
        validation_batches: int | None = None,
        validation_context: int | None = None,
    ) -> None:
        self.split = split_batch(batch.tokens, batch.context, batch.micro, world_size)
        self.context = batch.context
        self.validation_batches = validation_batches
        self.validation_context = validation_context or batch.context
        self.start_step = 0
        self.rank = 0

        self.tokenizer = load_tokenizer(data.tokenizer)
        corpus = read_corpus(data)
        self.description, self.digest = corpus.description, corpus.digest
        self.train = MemoryStore(join(corpus.train, self.tokenizer))
        self.held_out = MemoryStore(join(corpus.held_out, self.tokenizer))
        documents, store = (corpus.held_out, self.held_out) if corpus.held_out else (corpus.train, self.train)
        self.bytes_per_token = sum(len(document.text) + 1 for document in documents) / max(1, len(store))
        self.order = Order(seed, len(self.train), batch.context)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def largest_token(self) -> int:
        return int(max(store.tokens.max(initial=0) for store in (self.train, self.held_out)))

    @property
    def micro(self) -> int:
        return self.split.micro

    @property
    def accumulation(self) -> int:
        return self.split.accumulation

    def batch(self, step: int, index: int = 0) -> Batch:
        """This rank's micro-batch `index` (0 … accumulation-1) of step `step`: tokens, targets (B, T)."""
        return self.batch_at(self.order.starts(self.split.share(step, index, self.rank)))

    def batch_at(self, starts: Ints) -> Batch:
        """The training windows that start at these tokens (B,)."""
        return self._cut(self.train.windows(starts, self.context + 1))

    def training(self) -> TrainBatches:
        """The micro-batches from `start_step` on, without end."""
        return TrainBatches(self)

    def validation(self) -> ValidationBatches | tuple[()]:
        """The held-out text in windows, in order; over all batches and ranks every token of it is predicted once.

        Only the end-of-text that it begins with is no target. The last window is filled up with ignored targets,
        and so are windows that make the number of batches the same on every rank: a whole batch may be ignored.
        """
        length, ranks = self.validation_context, self.split.ranks
        windows = -(-max(0, len(self.held_out) - 1) // length)
        if windows == 0:
            return ()  # Lightning's word for no validation
        micro = min(
            max(1, self.micro * self.context // length), -(-windows // ranks)
        )  # no more tokens than in training
        batches = -(-windows // (micro * ranks))
        chosen = np.arange(batches * ranks * micro).reshape(batches, ranks, micro)
        if self.validation_batches is not None and self.validation_batches < batches:
            chosen = chosen[np.arange(self.validation_batches) * batches // self.validation_batches]
        return ValidationBatches(self, chosen[:, self.rank])

    def validation_batch(self, numbers: Ints) -> Batch:
        """The held-out windows with these numbers (B,); what lies past the end of the text is ignored."""
        places = numbers[:, None] * self.validation_context + np.arange(self.validation_context + 1)  # (B, T + 1)
        inside = places < len(self.held_out)
        text = self.held_out.tokens[np.where(inside, places, 0)].astype(np.int64)
        tokens, targets = self._cut(np.where(inside, text, self.tokenizer.end_of_text))
        return tokens, targets.masked_fill(~torch.from_numpy(inside[:, 1:]), IGNORED)

    @staticmethod
    def _cut(windows: Ints) -> Batch:
        """(B, T + 1) → tokens (B, T) and targets (B, T), one further."""
        both = torch.from_numpy(windows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


class TrainBatches:
    """One pass after the other; each iteration starts anew at the data module's start_step."""

    def __init__(self, data: Batches) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        data, step = self.data, self.data.start_step
        while True:  # the order of many steps in one go: one batch's alone takes longer than reading it
            shares = [data.split.share(step + i, j, data.rank) for i in range(AHEAD) for j in range(data.accumulation)]
            yield from map(data.batch_at, data.order.starts(np.stack(shares).ravel()).reshape(-1, data.micro))
            step += AHEAD


class ValidationBatches:
    """One validation: the held-out windows with the numbers in `chosen` (batches, B), a batch at a time."""

    def __init__(self, data: Batches, chosen: Ints) -> None:
        self.data = data
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Batch]:
        return (self.data.validation_batch(numbers) for numbers in self.chosen)
