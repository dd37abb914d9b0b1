"""Documents streamed from a data set of the `datasets` library, tokenised on the fly and cut into contexts.

Every rank reads the complete stream and keeps its own rows, so that the order does not depend on the number of ranks
and a position in it is one small dict, which a checkpoint stores. Tokenising is cheap beside training and runs in
separate processes. The order is the data set's own: nothing is shuffled.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_train.config import DataSettings
from rwkv_train.data import workers
from rwkv_train.data.arrays import Ints
from rwkv_train.data.bad_rows import BadRows
from rwkv_train.data.file_rows import FileRows
from rwkv_train.data.formats import KINDS, Kind, format_of
from rwkv_train.data.json_lines import JsonLines
from rwkv_train.data.rows import BatchArrays
from rwkv_train.data.sources import DataSource
from rwkv_train.data.store import MemoryStore
from rwkv_train.data.tokenizers import Tokenizer, Tokens, load_tokenizer
from rwkv_train.errors import UserError
from rwkv_train.json_files import parse_json
from rwkv_train.user_path import user_path

DOCUMENTS_PER_CHUNK = 64  # tokenised by one call
_ROWS_WITHOUT_TEXT = 10  # at the beginning of a data set: the column is another one
CHUNKS_AHEAD = 4  # queued per process
PROBE_SAMPLES = 8  # after each step, among which a checkpoint looks for its probe
HUB_SECONDS = 10.0  # for the first answer of the hub, which says whether it has a data set
KINDS_OF_ROWS: tuple[Kind, ...] = ("jsonl", "json", "parquet", "text")


@dataclass(frozen=True)
class _Chunk:
    """Consecutive documents as tokens, with an end-of-text before each.

    Attributes:
        position: where the data set resumes to read them again, as JSON.
        offset: number of tokens of the stream before them.
        tokens: their tokens, (N,).
    """

    position: str
    offset: int
    tokens: Tokens

    @property
    def end(self) -> int:
        return self.offset + len(self.tokens)


class _Samples:
    """Rows of a token stream: row n has the tokens n·T … n·T + T."""

    per_epoch = 2**62  # the length of an epoch is unknown; the data set is read again at its end

    def __init__(self, context: int) -> None:
        self.context = context

    def offsets(self, samples: Ints) -> Ints:
        return samples

    def count_predictions(self, offsets: Ints) -> Ints:
        return np.full(offsets.shape, self.context, np.int64)

    def _fill_from(self, chunks: Iterable[_Chunk], offset: int, row: BatchArrays) -> None:
        begin, end = offset * self.context, (offset + 1) * self.context + 1
        pieces = [chunk.tokens[max(0, begin - chunk.offset) : max(0, end - chunk.offset)] for chunk in chunks]
        window = np.concatenate(pieces)
        row.tokens[:], row.targets[:] = window[:-1], window[1:]


class StreamPosition(_Samples):
    """Where a stream continues after a step, and the next PROBE_SAMPLES rows.

    It never changes: any thread may use it. It is neither a tuple nor a data class: Lightning copies those when it
    moves a batch to a device.

    Args:
        chunks: consecutive ones, which have the tokens of these rows.
        context: T, tokens of a row.
    """

    def __init__(self, chunks: Sequence[_Chunk], context: int) -> None:
        super().__init__(context)
        self._chunks = tuple(chunks)

    def as_json(self) -> dict[str, Any]:
        """For `StreamRows.go_to`; JSON values only."""
        position: dict[str, Any] = parse_json(self._chunks[0].position)
        return position

    def fill(self, offset: int, row: BatchArrays) -> None:
        self._fill_from(self._chunks, offset, row)


class StreamRows(_Samples):
    """Reads a token stream. Rows must be requested in about the order of their numbers, by one thread at a time.

    Args:
        dataset: an IterableDataset.
        settings: the data settings: field, tokenizer, held-out documents, worker processes.
        extend: texts that become single tokens (`vocab.extend`).
        context: T, tokens of a row.

    Attributes:
        keep: number of rows before the newest that may be requested again.
        bad: the rows of the data set that have been left out since the start.
    """

    def __init__(self, dataset: Any, settings: DataSettings, extend: Sequence[str], context: int) -> None:
        super().__init__(context)
        self.dataset, self.settings, self.extend = dataset, settings, tuple(extend)
        self.keep, self.bad = 0, BadRows(settings.max_bad_rows)
        self._chunks: deque[_Chunk] = deque()
        self._arriving: Generator[_Chunk, None, None] | None = None
        self._start_state = dataset.state_dict()
        self._position: dict[str, Any] = {"offset": 0, "epoch": 0, "dataset": None}

    def fill(self, offset: int, row: BatchArrays) -> None:
        self._read_until((offset + 1) * self.context + 1)
        self._fill_from(self._chunks, offset, row)
        oldest = (offset - self.keep) * self.context
        while len(self._chunks) > 1 and self._chunks[1].offset <= oldest:
            self._chunks.popleft()

    def position(self, sample: int) -> StreamPosition:
        """The position from which the stream resumes at a sample, which is not older than `keep` rows."""
        begin = sample * self.context
        self._read_until(begin + PROBE_SAMPLES * self.context + 1)
        return StreamPosition([chunk for chunk in self._chunks if chunk.end > begin], self.context)

    def go_to(self, position: dict[str, Any]) -> None:
        """Continues reading at a position that `StreamPosition.as_json` returned."""
        self.close()
        self._position = position
        self._chunks.clear()

    def close(self) -> None:
        """Ends the tokenising processes. If more rows are requested, reading begins at the last known position."""
        if self._arriving is not None:
            self._arriving.close()
            self._arriving = None
            self._position = parse_json(self._chunks[0].position) if self._chunks else self._position
            self._chunks.clear()

    def _read_until(self, end: int) -> None:
        if self._arriving is None:
            self._arriving = self._tokenized_chunks()
        while not self._chunks or self._chunks[-1].end < end:
            self._chunks.append(next(self._arriving))

    def _tokenized_chunks(self) -> Generator[_Chunk, None, None]:
        """Yields chunks in order from the current position, tokenised in parallel while the next ones are read."""
        offset, processes, tokenizer = self._position["offset"], self.settings.workers, str(self.settings.tokenizer)
        if not processes:
            workers.set_up(tokenizer, self.extend)
            for position, texts in self._read():
                tokens = _encode(texts)
                yield _chunk(position, offset, tokens)
                offset += len(tokens)
        waiting: deque[tuple[dict[str, Any], Future[Tokens]]] = deque()
        reading = self._read()
        with workers.pool(processes, tokenizer, self.extend) as pool:
            try:
                while True:
                    while len(waiting) < CHUNKS_AHEAD * processes:
                        position, texts = next(reading)
                        waiting.append((position, pool.submit(_encode, texts)))
                    position, future = waiting.popleft()
                    tokens = future.result()
                    yield _chunk(position, offset, tokens)
                    offset += len(tokens)
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
        """Yields chunks of documents and the position before each, epoch after epoch without end."""
        epoch, state = self._position["epoch"], self._position["dataset"]
        while True:
            self.dataset.load_state_dict(self._start_state if state is None else state)
            skip = self.settings.held_out_documents if state is None else 0
            documents, count = texts_of(self.dataset, self.settings.field, self.bad), 0
            for _ in range(skip):
                next(documents, None)
            while True:
                position = {"epoch": epoch, "dataset": self.dataset.state_dict() if skip or count or state else None}
                texts = list(islice(documents, DOCUMENTS_PER_CHUNK))
                if not texts:
                    break
                count += len(texts)
                yield position, texts
            if not count and state is None:
                raise UserError(
                    f"data.path={self.settings.path} has no document to train on beyond the "
                    f"{self.settings.held_out_documents} held-out ones",
                    "lower data.held_out_documents, or give a data set with more documents",
                )
            self.bad.check(complete=True)
            epoch, state = epoch + 1, None


def _chunk(position: dict[str, Any], offset: int, tokens: Tokens) -> _Chunk:
    return _Chunk(json.dumps({**position, "offset": offset}), offset, tokens)


def texts_of(dataset: Any, field: str, bad: BadRows) -> Iterator[bytes]:
    """Yields the documents of a data set: the texts of one column, as UTF-8.

    Args:
        dataset: an IterableDataset, `JsonLines` or `FileRows`.
        field: the column.
        bad: counts the rows without a text.

    Raises:
        UserError: too many rows have no text in that column, or the data set cannot be read further.
    """
    number, found, columns = 0, 0, ""
    rows = iter(dataset)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the library raises many types
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise UserError(
                f"the data set cannot be read behind row {number:,} ({type(error).__name__}: {reason})",
                "correct the file or leave it out; of .jsonl, .json and .parquet files such rows are left out",
            ) from None
        if row is None:
            break
        number += 1
        where = getattr(dataset, "where", "") or f"row {number:,}"
        text = row if isinstance(row, str) else row.get(field)
        if isinstance(row, str) or not isinstance(text, str):
            columns = columns or ("" if isinstance(row, str) else ", ".join(row))
            if not found and number >= _ROWS_WITHOUT_TEXT and columns:
                break
            bad.leave_out(where, row if isinstance(row, str) else f"no text in {field}")
            continue
        try:
            document = text.encode()
        except UnicodeEncodeError:  # an escaped lone surrogate
            bad.leave_out(where, "not UTF-8")
            continue
        found, bad.rows = found + 1, bad.rows + 1
        yield document
    if number and not found and columns:
        raise UserError(
            f"data.field={field}: a row has no text in this column; its columns are {columns}",
            "set data.field to the column of the text",
        )


def _encode(texts: Sequence[bytes]) -> Tokens:
    """Tokenises documents into one array, with an end-of-text before each."""
    tokenizer = workers.tokenizer()
    end = np.full(1, tokenizer.end_of_text, tokenizer.encode(b"").dtype)
    return np.concatenate([piece for text in texts for piece in (end, tokenizer.encode(text))])


def open_stream(data: DataSettings, extend: Sequence[str], context: int) -> tuple[Tokenizer, DataSource, StreamRows]:
    """Opens a streamed data set.

    Returns:
        The tokenizer, the source with its held-out documents, and the rows to train on.

    Raises:
        UserError: the data set cannot be opened, or a row has no text.
    """
    tokenizer = load_tokenizer(str(data.tokenizer), extend)
    dataset = open_dataset(str(data.path), data.split, data.field)
    held = list(islice(texts_of(dataset, data.field, BadRows(data.max_bad_rows)), data.held_out_documents))
    pieces = [np.full(1, tokenizer.end_of_text, tokenizer.encode(b"").dtype)]
    for text in held:
        pieces += [tokenizer.encode(text), pieces[0]]
    held_out = MemoryStore(np.concatenate(pieces if held else [pieces[0][:0]]))
    digest = hashlib.sha256(f"{data.path} {data.split} {data.field}".encode())
    for text in held:
        digest.update(text + b"\0")
    description = (
        f"{data.path}: streamed in its own order, without a shuffle (a store made by `rwkv-train prepare` is "
        f"shuffled); every rank reads all of it; held out: the first {len(held):,} documents, {len(held_out):,} tokens"
    )
    empty = MemoryStore(pieces[0][:0])
    source = DataSource("stream", empty, held_out, description, digest.hexdigest()[:16], 0, tokenizer.vocab_size - 1)
    rows = StreamRows(open_dataset(str(data.path), data.split, data.field), data, extend, context)
    return tokenizer, source, rows


def open_dataset(path: str, split: str, field: str) -> Any:
    """Opens local files (one, or a glob), or a data set of the hub by name, as an IterableDataset or one of our own.

    Args:
        path: of the files, or the name.
        split: of a data set of the hub.
        field: the column of the text.

    Raises:
        UserError: the files are of several kinds, or nothing can be opened.
    """
    given = user_path(path)
    files = [str(given)] if given.is_file() else sorted(glob.glob(str(given), recursive=True))
    files = [name for name in files if Path(name).is_file()]
    if not files and given.exists() and not given.is_dir():
        raise UserError(f"{path} is no file: it can be read once, and a stream is read again", "write it to a file")
    try:
        if files:
            kinds = {format_of(Path(name)).kind for name in files}
            if len(kinds) > 1 or not kinds <= set(KINDS_OF_ROWS):
                raise UserError(
                    f"{path} names files of several or of unknown kinds",
                    f"give files of one kind: {', '.join(s for s, kind in KINDS.items() if kind in KINDS_OF_ROWS)}",
                )
            if kinds == {"jsonl"}:
                return JsonLines(files)
            return FileRows(files, field)
        if not given.exists():
            from huggingface_hub import HfApi

            HfApi().dataset_info(path, timeout=HUB_SECONDS)  # `datasets` asks five times, and waits as long as it takes
        import datasets

        return datasets.load_dataset(path, split=split, streaming=True)
    except UserError:
        raise
    except Exception as error:  # the library and the hub's client raise many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is neither a local file nor a reachable data set ({type(error).__name__}: {reason})",
            "give local files ('DIRECTORY/*.jsonl'), or the name of a data set on the hub (needs network)",
        ) from None
