"""The batch of every rank in every micro-batch of every step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rwkv_train.config import BatchSettings, DataSettings
from rwkv_train.config.mesh import ONE_RANK, Mesh
from rwkv_train.data.ahead import Ahead
from rwkv_train.data.arrays import Ints
from rwkv_train.data.batch import Batch
from rwkv_train.data.bits_per_byte import token_bytes
from rwkv_train.data.mixture import Mixture, SourceShare
from rwkv_train.data.order import ReferenceOrder, ShuffledOrder, split_batch
from rwkv_train.data.packing import pack
from rwkv_train.data.rows import IGNORED_TARGET, BatchArrays, PackedRows, Rows, SequentialWindows, Windows
from rwkv_train.data.sources import DataSource, check_token_in_vocabulary, open_sources
from rwkv_train.data.store import MemoryStore, Store
from rwkv_train.data.stream import StreamRows, open_stream
from rwkv_train.errors import UserError

ORDERED_AT_ONCE = 8192  # samples whose order is computed in one call


class Batches:
    """Reads the data, and gives the batches of training and validation.

    The batches are made in the training process: to read a window takes less time than to receive it from another
    process. For a GPU a thread makes them ahead, in pinned memory.

    Args:
        data: which data, which tokenizer, what share is held out.
        batch: global batch, context and micro-batch.
        seed: of the order.
        mesh: all ranks; DataModule checks that the trainer has as many.
        validation_batches: at most so many batches per device in a validation, spread evenly over the held-out text;
            None: all of it.
        validation_context: tokens of one window of held-out text; None: batch.context.
        extend: texts that become a token each, after those of the tokenizer.
        vocabulary: tokens that the model knows; a larger one that is read is refused. None: the tokenizer's.

    Attributes:
        tokenizer: between bytes and tokens; vocab_size is its.
        sources: what is read, one or several.
        mixture: which source each sample is of.
        description: one line for people and source: what it holds, its hash, what is held out, what was skipped.
        digest: hash of the data and its split, 16 hexadecimal digits.
        micro, accumulation: samples of a micro-batch; micro-batches of a step on one device.
        start_step: the step that training() begins with: `begin` sets it.
        skips: (step, steps of data) pairs: from that step of the run on, so many steps of the data are skipped.
        rank: data-parallel index of this process; DataModule sets it.
        pinned: whether training batches are made ahead in pinned memory; DataModule sets it.

    Raises:
        UserError: no data, fewer tokens than one sample, or a batch that cannot be divided among the ranks.
    """

    def __init__(
        self,
        data: DataSettings,
        batch: BatchSettings,
        seed: int,
        mesh: Mesh = ONE_RANK,
        validation_batches: int | None = None,
        validation_context: int | None = None,
        extend: Sequence[str] = (),
        vocabulary: int | None = None,
    ) -> None:
        self.split = split_batch(batch.tokens, batch.context, batch.micro, mesh)
        self.context = batch.context
        self.validation_batches = validation_batches
        self.validation_context = validation_context or batch.context
        self.start_step = 0
        self.skips: list[tuple[int, int]] = []
        self.rank = 0
        self.pinned = False
        self.packed, self.reset = data.documents == "packed", data.documents == "packed" and data.reset
        self.stream: StreamRows | None = None
        if data.source == "stream":
            self.tokenizer, source, self.stream = open_stream(data, extend, batch.context)
            self.sources = [source]
        else:
            self.tokenizer, self.sources = open_sources(data, extend)
        self.vocabulary = vocabulary or self.tokenizer.vocab_size
        self._rows = [self._training_rows(data, source, seed, number) for number, source in enumerate(self.sources)]
        self._held_out = [self._held_out_rows(source) for source in self.sources]
        self.mixture = self._mix(data, batch.tokens)

    def _training_rows(self, data: DataSettings, source: DataSource, seed: int, number: int) -> Rows:
        if self.stream is not None:
            self.stream.keep = 8 * self.split.samples  # loaders are some passes ahead of the step that is saved
            return self.stream
        if self.packed:
            return self._pack(source.train, self.context, seed + (number << 32))
        if data.order == "reference":
            return Windows(source.train, ReferenceOrder(len(source.train), self.context), self.context)
        return Windows(
            source.train, ShuffledOrder(seed + (number << 32), len(source.train), self.context), self.context
        )

    def _held_out_rows(self, source: DataSource) -> Rows:
        if self.packed:
            return self._pack(source.held_out, self.validation_context, None)
        return SequentialWindows(source.held_out, self.validation_context, self.tokenizer.end_of_text)

    def _pack(self, store: Store, context: int, seed: int | None) -> PackedRows:
        starts, lengths = store.documents()
        packing = pack(starts, lengths, context)
        if seed is not None and not len(packing):
            raise UserError("the training data has no document with a token in it", "give more text: data.path=…")
        return PackedRows(store, packing, seed, self.tokenizer.end_of_text, self.reset)

    def _mix(self, data: DataSettings, tokens_per_step: int) -> Mixture:
        given = data.sources if data.source == "mixture" else [None] * len(self.sources)
        shares = []
        for source, rows, settings in zip(self.sources, self._rows, given, strict=True):
            weight = settings.weight if settings is not None else 1
            epochs = settings.epochs if settings is not None else None
            shares.append(
                SourceShare(source.name, len(source.train) if weight is None else weight, rows.per_epoch, epochs)
            )
        # rounded up to steps: a batch has the weights of one stage
        steps = [-(-stage.tokens // tokens_per_step) for stage in data.curriculum]
        stages = zip(steps, data.curriculum, strict=True)
        return Mixture(shares, [(step * self.split.samples, stage.weights) for step, stage in stages])

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def largest_token(self) -> int:
        """The largest one in the data; the model's vocabulary must hold it. 0 for a stream, of which it is unknown."""
        return max(source.largest_token for source in self.sources)

    @property
    def train(self) -> Any:
        """The training tokens of the first source."""
        return self.sources[0].train

    @property
    def held_out(self) -> Any:
        """The held-out tokens of the first source."""
        return self.sources[0].held_out

    @property
    def order(self) -> Any:
        """The order of the first source's windows."""
        return self._rows[0].order  # type: ignore[attr-defined]

    @property
    def plain(self) -> tuple[Any, Any] | None:
        """Training and held-out text as bytes, where the data is one text read byte by byte and some is held out."""
        one = len(self.sources) == 1 and self.tokenizer.identity == "bytes" and not self.packed
        stores = (self.train, self.held_out)
        plain = one and len(self.held_out) and all(isinstance(store, MemoryStore) for store in stores)
        return (self.train.tokens, self.held_out.tokens) if plain else None

    @property
    def description(self) -> str:
        lines = [source.description for source in self.sources]
        if len(lines) > 1:
            weights = self.mixture.weights()
            lines = [f"{s.name} {weights[s.name]:.2%}: {line}" for s, line in zip(self.sources, lines, strict=True)]
        if self.packed:
            fills = [rows.packing.fill for rows in self._rows if isinstance(rows, PackedRows)]
            state = "the state is reset at each" if self.reset else "the state continues across them"
            lines.append(f"packed documents, {min(fills):.1%} of the positions filled; {state}")
        return "\n        ".join(lines)

    @property
    def digest(self) -> str:
        digests = [source.digest for source in self.sources]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]

    @cached_property
    def token_bytes(self) -> Ints:
        """Bytes that each token counts as in bits per byte, (V,)."""
        return token_bytes(self.tokenizer, self.vocabulary)

    @property
    def micro(self) -> int:
        return self.split.micro

    @property
    def accumulation(self) -> int:
        return self.split.accumulation

    @property
    def masked(self) -> bool:
        """Whether some targets of a training batch may be no prediction."""
        return self.packed

    def tokens_by_source(self, step: int) -> dict[str, int]:
        """Tokens of each source that the steps before this one have, by its name."""
        counts = self.mixture.counts((self.data_step(step - 1) + 1) * self.split.samples)
        for first, steps in self.skips:
            if first < step:
                end = self.data_step(first) * self.split.samples
                counts = counts - self.mixture.counts(end) + self.mixture.counts(end - steps * self.split.samples)
        return {source.name: int(n) * self.context for source, n in zip(self.sources, counts, strict=True)}

    def share_out(self, micro: int) -> None:
        """Divides a device's share of each step into micro-batches of so many samples; a step keeps its samples."""
        self.split = split_batch(self.split.samples * self.context, self.context, micro, self.split.mesh)

    def position(self, step: int) -> dict[str, Any] | None:
        """The position from which a stream is read to resume with that step; None: the step alone determines it."""
        return None if self.stream is None else self.stream.position(self.data_step(step) * self.split.samples)

    def data_step(self, step: int) -> int:
        """Which step of the data a step of the run reads: a pure function of the step and of the skips."""
        return step + sum(steps for first, steps in self.skips if first <= step)

    def begin(self, step: int, position: dict[str, Any] | None, skips: Sequence[tuple[int, int]] | None = None) -> None:
        """Makes training() begin with that step, at that position of a stream; skips=None keeps the present ones."""
        self.start_step = step
        if skips is not None:
            self.skips = list(skips)
        if self.stream is not None and position is not None:
            self.stream.go_to(position)

    def refuse_budget(self, steps: int | None) -> None:
        """Raises a UserError where the sources may not be read for so many steps."""
        most = self.mixture.samples
        if most is not None and (steps is None or steps * self.split.samples > most):
            steps_left = most // self.split.samples
            raise UserError(
                f"the sources may be read for {steps_left:,} steps "
                f"({steps_left * self.split.samples * self.context:,} tokens), "
                f"the budget is {'without end' if steps is None else f'{steps:,} steps'}",
                f"budget.steps={steps_left}, or more epochs for a source (epochs: null is without end)",
            )

    def batch(self, step: int, index: int = 0) -> Batch:
        """This rank's micro-batch `index` (0 … accumulation-1) of step `step`."""
        return self.assemble(*self.offsets(step), index)

    def first_sample(self, data_step: int) -> Batch:
        """The first sample of a step of the data, the same one on every rank and for every world size."""
        first = np.arange(data_step * self.split.samples, data_step * self.split.samples + 1, dtype=np.int64)
        sources, offsets = self.locate(first)
        block = self._fill(self._rows, sources, offsets, self.context)
        return _batch(block, np.zeros(1, np.int64), sources, _mean(block) if self.masked else None)

    def offsets(self, step: int, steps: int = 1) -> tuple[Ints, Ints]:
        """Sources and offsets of all samples of `steps` steps, in the order of their numbers."""
        firsts = np.array([self.data_step(step + n) for n in range(steps if self.skips else 1)], np.int64)
        each = self.split.samples if self.skips else steps * self.split.samples
        return self.locate((firsts[:, None] * self.split.samples + np.arange(each, dtype=np.int64)).ravel())

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """Sources, and offsets in them, of the samples with these numbers; the same shape."""
        if len(self._rows) == 1 and self.mixture.samples is None:
            return np.zeros_like(samples), self._rows[0].offsets(samples)
        sources, numbers = self.mixture.locate(samples)
        offsets = np.empty_like(numbers)
        for source in np.unique(sources):
            here = sources == source
            offsets[here] = self._rows[source].offsets(numbers[here])
        return sources, offsets

    def sample(self, step: int, number: int) -> dict[str, Any]:
        """Describes a sample of a step for messages: its number, source, offset in it ("place"), and text."""
        sources, offsets = (each[number : number + 1] for each in self.offsets(step))
        described = {"number": number, "source": self.sources[int(sources[0])].name, "place": int(offsets[0])}
        if self.stream is not None:  # what was read cannot be read again
            return {**described, "text": ""}
        block = self._fill(self._rows, sources, offsets, self.context)
        return {**described, "text": bytes(self.tokenizer.decode(block.tokens[0].tolist())).decode("utf-8", "replace")}

    def assemble(self, sources: Ints, offsets: Ints, index: int) -> Batch:
        """This rank's micro-batch of the step with these samples."""
        share = self.split.share(0, index, self.rank)
        block = self._fill(self._rows, sources[share], offsets[share], self.context)
        if not self.masked:
            return _batch(block, share, sources[share])
        predicted = sum(int(rows.count_predictions(offsets[sources == n]).sum()) for n, rows in enumerate(self._rows))
        return _batch(block, share, sources[share], max(1, predicted) / (self.split.mesh.data * self.accumulation))

    def _fill(self, rows: Sequence[Rows], sources: Ints, offsets: Ints, context: int) -> BatchArrays:
        block = BatchArrays.empty(len(offsets), context, self.reset)
        for number, (source, offset) in enumerate(zip(sources.tolist(), offsets.tolist(), strict=True)):
            rows[source].fill(offset, block.row(number))
        limit = self.vocabulary
        unsure = any(source.bound >= limit for source in self.sources)
        if unsure and (largest := int(block.tokens.max())) >= limit:
            row = int(block.tokens.max(axis=1).argmax())
            where = f"{self.sources[int(sources[row])].name}, sample at token {int(offsets[row]):,},"
            check_token_in_vocabulary(largest, limit, where)
        return block

    def training(self) -> TrainBatches | Ahead:
        """The micro-batches from `start_step` on, without end."""
        return Ahead(TrainBatches(self)) if self.pinned else TrainBatches(self)

    def validation(self, source: int = 0) -> ValidationBatches | tuple[()]:
        """The held-out text of a source, in order; over all batches and ranks every token of it is predicted once.

        Only the end-of-text that it begins with is no target. The last window is padded with ignored targets,
        and so are windows that make the number of batches the same on every rank: a batch may have no target at all.
        """
        length, ranks, windows = self.validation_context, self.split.mesh.data, self._held_out[source].per_epoch
        if windows == 0:
            return ()  # no validation, for Lightning
        micro = min(
            max(1, self.micro * self.context // length), -(-windows // ranks)
        )  # no more tokens than in training
        batches = -(-windows // (micro * ranks))
        chosen = np.arange(batches * ranks * micro).reshape(batches, ranks, micro)
        if self.validation_batches is not None and self.validation_batches < batches:
            chosen = chosen[np.arange(self.validation_batches) * batches // self.validation_batches]
        return ValidationBatches(self, source, chosen[:, self.rank])

    @property
    def validated(self) -> list[int]:
        """The numbers of the sources that have held-out text."""
        return [number for number, rows in enumerate(self._held_out) if rows.per_epoch]

    def validation_batch(self, source: int, numbers: Ints) -> Batch:
        """The held-out rows of a source with these numbers (B,); targets after the end of the text are ignored."""
        sources = np.full_like(numbers, source)
        block = self._fill(self._held_out, sources, numbers, self.validation_context)
        return _batch(block, numbers, sources, None if block.starts is None else _mean(block))


def _batch(block: BatchArrays, samples: Ints, sources: Ints, predictions: float | None = None) -> Batch:
    return Batch(
        torch.from_numpy(block.tokens),
        torch.from_numpy(block.targets),
        samples,
        sources,
        None if block.starts is None else torch.from_numpy(block.starts),
        None if predictions is None else torch.tensor(predictions),
    )


def _mean(block: BatchArrays) -> float:
    """The `predictions` of a batch of its own, whose loss is the mean over them."""
    return float(max(1, (block.targets != IGNORED_TARGET).sum()))


class TrainBatches:
    """The micro-batches in order; each iteration begins at `start_step` of the data."""

    def __init__(self, data: Batches) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        data, step = self.data, self.data.start_step
        while True:  # the order of many steps at once: that of a single batch takes longer than to read it
            steps = max(1, ORDERED_AT_ONCE // data.split.samples)
            if data.mixture.samples is not None:
                steps = max(1, min(steps, data.mixture.samples // data.split.samples - data.data_step(step)))
            sources, offsets = (each.reshape(steps, -1) for each in data.offsets(step, steps))
            for number in range(steps):
                for index in range(data.accumulation):
                    yield data.assemble(sources[number], offsets[number], index)
            step += steps


class ValidationBatches:
    """One validation: the held-out rows of a source with the numbers in `chosen` (batches, B), a batch at a time."""

    def __init__(self, data: Batches, source: int, chosen: Ints) -> None:
        self.data = data
        self.source = source
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Batch]:
        return (self.data.validation_batch(self.source, numbers) for numbers in self.chosen)
