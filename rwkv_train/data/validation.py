"""The validation of a run: which rows of the held-out text are scored. Training and `rwkv-train eval` read it here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rwkv_train.config import Config, DataSettings
from rwkv_train.data.arrays import Ints
from rwkv_train.data.batch import Batch
from rwkv_train.data.learned import LearnedTokenizer
from rwkv_train.data.rows import PackedRows, Rows, SequentialWindows, read_rows
from rwkv_train.data.sources import DataSource, check_rows_in_vocabulary, open_sources
from rwkv_train.data.stream import open_stream


class Validation:
    """The held-out rows of all sources, with the packing, mask and reset of the run.

    With `batches`, so many batches of the global size are scored, spread evenly over the held-out text of all sources,
    each source having at least one. Which rows these are depends on neither ranks nor micro-batches, and so does no
    result.

    Args:
        data: how documents are packed and whether their state is reset.
        sources: of the run.
        end_of_text: token with which rows are padded.
        context: tokens of a row.
        batch_tokens: tokens of a global batch; a batch has at least one row.
        batches: number of batches over all ranks and sources; None: all held-out text.
        vocabulary: tokens that the model knows.

    Attributes:
        sources: of the run.
        rows: the held-out rows of each source.
        chosen: (N,) numbers of the rows that are scored, ascending, for each source.
    """

    def __init__(
        self,
        data: DataSettings,
        sources: Sequence[DataSource],
        end_of_text: int,
        context: int,
        batch_tokens: int,
        batches: int | None,
        vocabulary: int,
    ) -> None:
        self.sources, self.context, self.vocabulary = sources, context, vocabulary
        self.reset = data.documents == "packed" and data.reset
        self.rows: list[Rows] = [
            PackedRows.of(source.held_out, context, None, end_of_text, self.reset)
            if data.documents == "packed"
            else SequentialWindows(source.held_out, context, end_of_text)
            for source in sources
        ]
        self.chosen = _spread([rows.per_epoch for rows in self.rows], max(1, batch_tokens // context), batches)

    @classmethod
    def of_run(
        cls,
        config: Config,
        vocabulary: int,
        context: int | None = None,
        learned: LearnedTokenizer | None = None,
    ) -> Validation:
        """The validation of a run, from its config alone.

        Args:
            config: of the run.
            vocabulary: tokens that the model knows.
            context: tokens of a row instead of the run's.
            learned: the run's tokenizer, with data.tokenizer=bpe:SIZE.

        Raises:
            UserError: the data is missing or damaged.
        """
        data, extend, context = config.data, config.vocab.extend, context or config.validation.context
        context = context or config.batch.context
        if data.source == "stream":
            tokenizer, source, _ = open_stream(data, extend, config.batch.context)
            sources = [source]
        else:
            tokenizer, sources = open_sources(data, extend, learned)
        tokens, batches = config.batch.tokens, config.validation.batches
        return cls(data, sources, tokenizer.end_of_text, context, tokens, batches, vocabulary)

    @property
    def validated(self) -> list[int]:
        """The numbers of the sources that have held-out text."""
        return [number for number, rows in enumerate(self.rows) if rows.per_epoch]

    def batches(self, source: int, ranks: int, rank: int, micro: int) -> ValidationBatches | tuple[()]:
        """The batches of a rank, at most `micro` rows each; () where the source has no held-out text.

        All ranks have the same number of batches. What they lack is filled up with rows beyond the end, which have no
        targets: a batch may have no target at all.
        """
        numbers = self.chosen[source]
        if not len(numbers):
            return ()  # no validation, for Lightning
        micro = min(micro, -(-len(numbers) // ranks))
        count = -(-len(numbers) // (micro * ranks))
        padded = np.full(count * ranks * micro, self.rows[source].per_epoch, np.int64)
        padded[: len(numbers)] = numbers
        return ValidationBatches(self, source, padded.reshape(count, ranks, micro)[:, rank])

    def batch(self, source: int, numbers: Ints) -> Batch:
        """The held-out rows of a source with these numbers (B,); targets after the end of the text are ignored."""
        sources = np.full_like(numbers, source)
        block = read_rows(self.rows, sources, numbers, self.context, self.reset)
        check_rows_in_vocabulary(block, self.sources, sources, numbers, self.vocabulary)
        return Batch.of(block, numbers, sources)


class ValidationBatches:
    """One validation: the held-out rows of a source with the numbers in `chosen` (batches, B), a batch at a time."""

    def __init__(self, data: Validation, source: int, chosen: Ints) -> None:
        self.data = data
        self.source = source
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Batch]:
        return (self.data.batch(self.source, numbers) for numbers in self.chosen)


def _spread(rows: Sequence[int], each: int, batches: int | None) -> list[Ints]:
    """The numbers of the rows that are scored, for each source.

    Args:
        rows: number of rows of each source.
        each: rows of a batch.
        batches: how many batches of consecutive rows; None: all.
    """
    available = [-(-count // each) for count in rows]
    if batches is None or batches >= sum(available):
        return [np.arange(count) for count in rows]
    ends = np.cumsum(available) * batches // sum(available)
    chosen = []
    for count, known, share in zip(rows, available, np.diff(ends, prepend=0).tolist(), strict=True):
        number = min(known, max(1, share))
        firsts = np.arange(number) * known // max(1, number) * each
        numbers = (firsts[:, None] + np.arange(each)).ravel()
        chosen.append(numbers[numbers < count])
    return chosen
