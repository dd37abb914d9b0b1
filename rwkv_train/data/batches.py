"""The batch of every rank in every micro-batch of every step."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rwkv_train.config import BatchSettings, DataSettings
from rwkv_train.config.mesh import ONE_RANK, Mesh
from rwkv_train.data.ahead import Ahead
from rwkv_train.data.arrays import Ints
from rwkv_train.data.batch import Batch
from rwkv_train.data.bits_per_byte import token_bytes
from rwkv_train.data.course import Course
from rwkv_train.data.iteration import TrainBatches
from rwkv_train.data.learned import LearnedTokenizer
from rwkv_train.data.mixture import Mixture, SourceShare
from rwkv_train.data.order import ReferenceOrder, ShuffledOrder, split_batch
from rwkv_train.data.rows import IGNORED_TARGET, BatchArrays, PackedRows, Rows, Windows, read_rows
from rwkv_train.data.sources import DataSource, check_rows_in_vocabulary, digest_of, open_sources
from rwkv_train.data.stream import StreamPosition, StreamRows, open_stream
from rwkv_train.data.tokenizers import tokenizer_note
from rwkv_train.data.validation import Validation, ValidationBatches
from rwkv_train.errors import UserError


class Batches:
    """Reads the data, and gives the batches of training and validation.

    The batches are made in the training process: to read a window takes less time than to receive it from another
    process. For a GPU a thread makes them ahead, in pinned memory.

    Args:
        data: which data, which tokenizer, what share is held out.
        batch: global batch, context and micro-batch.
        seed: of the order.
        mesh: all ranks; DataModule checks that the trainer has as many.
        validation_batches: at most so many batches of batch.tokens in a validation, over all ranks and sources, spread
            evenly over the held-out text; None: all of it.
        validation_context: tokens of one window of held-out text; None: batch.context.
        extend: texts that become a token each, after those of the tokenizer.
        vocabulary: tokens that the model knows; a larger one that is read is refused. None: the tokenizer's.
        learned: see `open_sources`.

    Attributes:
        tokenizer: between bytes and tokens; vocab_size is its.
        sources: what is read, one or several.
        mixture: which source each sample is of.
        held_out_rows: the rows of every validation.
        description: one line for people and source: what it holds, its hash, what is held out, what was skipped.
        digest: hash of the data and its split, 16 hexadecimal digits.
        micro, accumulation: samples of a micro-batch; micro-batches of a step on one device.
        start_step: the step that training() begins with: `begin` sets it.
        end_step: the step before which training() ends: `end_before` sets it; None: it ends with the data.
        course: which samples the steps read: `begin` sets it.
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
        learned: LearnedTokenizer | None = None,
    ) -> None:
        self.split = split_batch(batch.tokens, batch.context, batch.micro, mesh)
        self.context = batch.context
        self.start_step = 0
        self.end_step: int | None = None
        self.course = Course(0, 0, self.split.samples)
        self._tokens_before: Mapping[str, int] = {}  # of each source, before the first step of the course
        self._ahead = Ahead(TrainBatches(self))  # its thread owns the data while training iterates over it
        self._start: dict[str, Any] = {"offset": 0, "epoch": 0, "dataset": None}  # of a stream, before the first step
        self._after: StreamPosition | None = None  # of the last step trained on; None: none since `begin`
        self.rank = 0
        self.pinned = False
        self.packed, self.reset = data.documents == "packed", data.documents == "packed" and data.reset
        self.stream: StreamRows | None = None
        if data.source == "stream":
            self.tokenizer, source, self.stream = open_stream(data, extend, batch.context)
            self.sources = [source]
        else:
            self.tokenizer, self.sources = open_sources(data, extend, learned)
        self.vocabulary = vocabulary or self.tokenizer.vocab_size
        self._rows = [self._training_rows(data, source, seed, number) for number, source in enumerate(self.sources)]
        self._settings, self._stage_step = data, batch.tokens
        self.held_out_rows = Validation(
            data,
            self.sources,
            self.tokenizer.end_of_text,
            validation_context or batch.context,
            batch.tokens,
            validation_batches,
            self.vocabulary,
        )
        self.mixture = self._mix(data, batch.tokens)

    def _training_rows(self, data: DataSettings, source: DataSource, seed: int, number: int) -> Rows:
        if self.stream is not None:
            self.stream.keep = 8 * self.split.samples  # the probe of a resume is read before the first step
            return self.stream
        if self.packed:
            rows = PackedRows.of(
                source.train, self.context, seed + (number << 32), self.tokenizer.end_of_text, self.reset
            )
            if not rows.per_epoch:
                raise UserError("the training data has no document with a token in it", "give more text: data.path=…")
            return rows
        if data.order == "reference":
            return Windows(source.train, ReferenceOrder(len(source.train), self.context), self.context)
        return Windows(
            source.train, ShuffledOrder(seed + (number << 32), len(source.train), self.context), self.context
        )

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
        return Mixture(shares, [(-(-step * tokens_per_step // self.context), stage.weights) for step, stage in stages])

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
    def description(self) -> str:
        lines = [source.description for source in self.sources]
        if len(lines) > 1:
            weights = self.mixture.weights()
            lines = [f"{s.name} {weights[s.name]:.2%}: {line}" for s, line in zip(self.sources, lines, strict=True)]
        if self.packed:
            fills = [rows.packing.fill for rows in self._rows if isinstance(rows, PackedRows)]
            state = "the state is reset at each" if self.reset else "the state continues across them"
            lines.append(f"packed documents, {min(fills):.1%} of the positions filled; {state}")
        if note := tokenizer_note(self.tokenizer):
            lines.append(note)
        return "\n        ".join(lines)

    @property
    def digest(self) -> str:
        return digest_of(self.sources)

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
        counts = np.zeros(len(self.sources), np.int64)
        for first, end in self.course.ranges(step):
            counts += self.mixture.counts(end) - self.mixture.counts(first)
        found = {source.name: int(n) * self.context for source, n in zip(self.sources, counts, strict=True)}
        return {name: self._tokens_before.get(name, 0) + tokens for name, tokens in found.items()}

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """The ranges (first token, tokens) of the data's order that are passed over."""
        return [(first * self.context, (end - first) * self.context) for first, end in self.course.skips]

    def share_out(self, micro: int) -> None:
        """Divides a device's share of each step into micro-batches of so many samples; a step keeps its samples."""
        self.split = split_batch(self.split.samples * self.context, self.context, micro, self.split.mesh)

    def position(self) -> dict[str, Any] | None:
        """Where a stream continues after the last step trained on; None: the step alone determines it."""
        if self.stream is None:
            return None
        return self._start if self._after is None else self._after.as_json()

    def trained(self, batch: Batch) -> None:
        """Notes that a step was trained on, whose last micro-batch this is."""
        self._after = batch.after

    def steps_left(self, step: int, most: int) -> int:
        """How many steps from this one on are trained and have all their samples; at most `most`."""
        if self.end_step is not None:
            most = min(most, self.end_step - step)
        if self.mixture.samples is not None:
            ends = range(step + 1, step + max(0, most) + 1)
            most = bisect.bisect_right(ends, self.mixture.samples, key=self.course.end)
        return max(0, most)

    def begin(
        self,
        step: int,
        position: dict[str, Any] | None,
        course: Course | None = None,
        tokens: Mapping[str, int] | None = None,
    ) -> None:
        """Makes training() begin with a step. A thread that reads ahead is ended first: nobody else reads meanwhile.

        Args:
            step: the first one.
            position: of a stream; None: its beginning is the first sample of the course.
            course: which samples the steps from that one on read; None: the present one.
            tokens: of each source, that the steps before have; None: no step was before.

        Raises:
            TimeoutError: the thread does not end.
        """
        self._ahead.end()
        self.start_step = step
        if course is not None:
            self.course, self._tokens_before = course, tokens or {}
        if self.stream is not None:
            beginning = {"offset": self.course.first * self.context, "epoch": 0, "dataset": None}
            self._start, self._after = position or beginning, None
            self.stream.go_to(self._start)

    def end_before(self, step: int | None) -> None:
        """Makes training() end before a step; None: it ends with the data."""
        self.end_step = step

    def round_stages(self, tokens_per_step: int) -> None:
        """Makes the stages of a curriculum begin with a step of so many tokens: that with which the run began."""
        if tokens_per_step != self._stage_step:
            self._stage_step, self.mixture = tokens_per_step, self._mix(self._settings, tokens_per_step)

    def refuse_budget(self, steps: int | None) -> None:
        """Raises a UserError where the sources may not be read until that step, the first one being `start_step`."""
        end, course = self.mixture.samples, self.course
        if end is None or (steps is not None and course.end(steps) <= end):
            return
        possible = range(course.step + 1, course.step + max(0, end - course.first) // course.each + 1)
        more = bisect.bisect_right(possible, end, key=course.end)
        raise UserError(
            f"the sources may be read for {more:,} {'more ' if course.step else ''}steps "
            f"({more * course.each * self.context:,} tokens), "
            f"the budget is {'without end' if steps is None else f'{steps:,} steps'}",
            f"budget.steps={course.step + more}, or more epochs for a source (epochs: null is without end)",
        )

    def batch(self, step: int, index: int = 0) -> Batch:
        """This rank's micro-batch `index` (0 … accumulation-1) of step `step`."""
        return self.assemble(step, *self.offsets(step), index)

    def probe_samples(self, step: int, count: int) -> range:
        """The numbers of `count` samples from the first of a step on; before the end of the data, the last ones."""
        first, end = self.course.number(step), self.mixture.samples
        if end is not None:
            first, count = max(0, min(first, end - count)), min(count, end)
        return range(first, first + count)

    def lone_sample(self, number: int) -> Batch:
        """The sample with a number in the order of the data; the same one on every rank and for every world size.

        Of a stream it is one of the PROBE_SAMPLES after the last step trained on. Before the first step, and after the
        last one, it may be any that comes next: a thread that reads ahead is ended.
        """
        sources, offsets = self.locate(np.array([number], np.int64))
        if self.stream is not None and self._after is None:
            self._ahead.end()
        block = self._read(sources, offsets, self._rows if self._after is None else [self._after])
        return Batch.of(block, np.zeros(1, np.int64), sources, _mean(block) if self.masked else None)

    def offsets(self, step: int, steps: int = 1) -> tuple[Ints, Ints]:
        """Sources and offsets of all samples of `steps` steps, in the order of their numbers."""
        return self.locate(self.course.samples(step, steps))

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
        block = self._read(sources, offsets, self._rows)
        return {**described, "text": bytes(self.tokenizer.decode(block.tokens[0].tolist())).decode("utf-8", "replace")}

    def assemble(self, step: int, sources: Ints, offsets: Ints, index: int) -> Batch:
        """This rank's micro-batch of a step, which has these samples."""
        share = self.split.share(0, index, self.rank)
        block = self._read(sources[share], offsets[share], self._rows)
        last = index == self.accumulation - 1
        after = self.stream.position(self.course.number(step + 1)) if self.stream is not None and last else None
        if not self.masked:
            return Batch.of(block, share, sources[share], after=after)
        predicted = sum(int(rows.count_predictions(offsets[sources == n]).sum()) for n, rows in enumerate(self._rows))
        mean = max(1, predicted) / (self.split.mesh.data * self.accumulation)
        return Batch.of(block, share, sources[share], mean, after)

    def _read(self, sources: Ints, offsets: Ints, rows: Sequence[Rows]) -> BatchArrays:
        block = read_rows(rows, sources, offsets, self.context, self.reset)
        check_rows_in_vocabulary(block, self.sources, sources, offsets, self.vocabulary)
        return block

    def training(self) -> TrainBatches | Ahead:
        """The micro-batches of whole steps from `start_step` on, to `end_step` or to the end of the data."""
        return self._ahead if self.pinned else TrainBatches(self)

    @property
    def left_out(self) -> str:
        """Which rows of a stream could not be used; empty if all could."""
        return "" if self.stream is None else self.stream.bad.description

    def close(self) -> None:
        """Ends the thread that reads ahead, and the processes of a stream, which is read again where more is asked for.

        A thread that does not end keeps its stream: both end with this process.
        """
        with contextlib.suppress(TimeoutError):
            self._ahead.end()
            if self.stream is not None:
                self.stream.close()

    def validation(self, source: int = 0) -> ValidationBatches | tuple[()]:
        """This rank's batches of a validation of a source; over all batches and ranks each chosen row is read once.

        Only the end-of-text that the held-out text begins with is no target. A batch has no more tokens than in
        training, unless a single row has.
        """
        held_out, mesh = self.held_out_rows, self.split.mesh
        micro = max(1, self.micro * self.context // held_out.context)
        return held_out.batches(source, mesh.data, self.rank, micro)

    @property
    def validated(self) -> list[int]:
        """The numbers of the sources that have held-out text."""
        return self.held_out_rows.validated


def _mean(block: BatchArrays) -> float:
    """The `predictions` of a batch of its own, whose loss is the mean over them."""
    return float(max(1, (block.targets != IGNORED_TARGET).sum()))
