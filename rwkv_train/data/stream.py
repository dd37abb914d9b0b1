"""Documents streamed from a data set of the `datasets` library, tokenised on the way and cut into contexts.

Every rank reads the whole stream and keeps its own rows: so the order is the same whatever the number of ranks, and a
position in it is one small dict, which a checkpoint holds. Tokenising costs little beside training, and is done by
processes of its own. The order is the data set's: nothing is shuffled beyond its files.
"""

from __future__ import annotations

import glob
import hashlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_train.config import DataSettings
from rwkv_train.data import workers
from rwkv_train.data.order import Ints
from rwkv_train.data.rows import Block
from rwkv_train.data.sources import Source
from rwkv_train.data.store import MemoryStore
from rwkv_train.data.tokenizers import Tokenizer, Tokens, load_tokenizer
from rwkv_train.errors import UserError

CHUNK = 64  # documents that are tokenised in one go
READ_AHEAD = 4  # chunks that wait, per process
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class _Chunk:
    """Some documents in a row, as tokens with an end-of-text before each."""

    position: dict[str, Any]  # of the data set before the first of them
    offset: int  # tokens of the stream before them
    tokens: Tokens


class StreamRows:
    """Row n holds the tokens n·T … n·T + T of the stream; rows are asked for in about that order.

    Args:
        dataset: an IterableDataset.
        settings: field, number of held-out documents, processes.
        tokenizer: what is done in this process, and by name in the others.
        context: T.
    """

    per_epoch = 2**62  # it starts again at its end; nobody knows where that is

    def __init__(self, dataset: Any, settings: DataSettings, extend: Sequence[str], context: int) -> None:
        self.dataset, self.settings, self.extend, self.context = dataset, settings, tuple(extend), context
        self.keep = 0  # rows that may be asked for again, behind the newest
        self._chunks: deque[_Chunk] = deque()
        self._arriving: Generator[_Chunk, None, None] | None = None
        self._fresh = dataset.state_dict()
        self._position: dict[str, Any] = {"offset": 0, "epoch": 0, "dataset": None}

    def places(self, samples: Ints) -> Ints:
        return samples

    def predicted(self, places: Ints) -> Ints:
        return np.full(places.shape, self.context, np.int64)

    def fill(self, place: int, row: Block) -> None:
        window = self._window(place * self.context, self.context + 1)
        row.tokens[:], row.targets[:] = window[:-1], window[1:]
        oldest = (place - self.keep) * self.context
        while len(self._chunks) > 1 and self._chunks[1].offset <= oldest:
            self._chunks.popleft()

    def position(self, sample: int) -> dict[str, Any]:
        """Where the stream is to be read from, to go on with that sample; plain values."""
        held = [chunk for chunk in self._chunks if chunk.offset <= sample * self.context]
        return held[-1].position if held else self._position

    def go_to(self, position: dict[str, Any]) -> None:
        """Reads from a position on, one that `position` gave."""
        self.close()
        self._position = position
        self._chunks.clear()

    def close(self) -> None:
        """Ends the processes that tokenise."""
        if self._arriving is not None:
            self._arriving.close()
            self._arriving = None

    def _window(self, begin: int, length: int) -> Tokens:
        if self._arriving is None:
            self._arriving = self._arrive()
        while not self._chunks or self._chunks[-1].offset + len(self._chunks[-1].tokens) < begin + length:
            self._chunks.append(next(self._arriving))
        pieces = [
            chunk.tokens[max(0, begin - chunk.offset) : max(0, begin + length - chunk.offset)] for chunk in self._chunks
        ]
        return np.concatenate(pieces)

    def _arrive(self) -> Generator[_Chunk, None, None]:
        """The chunks from the position on, tokenised in order while the next ones are read."""
        offset, processes, tokenizer = self._position["offset"], self.settings.workers, str(self.settings.tokenizer)
        if not processes:
            workers.set_up(tokenizer, self.extend)
            for position, texts in self._read():
                tokens = _encode(texts)
                yield _Chunk({**position, "offset": offset}, offset, tokens)
                offset += len(tokens)
        waiting: deque[tuple[dict[str, Any], Future[Tokens]]] = deque()
        reading = self._read()
        with workers.pool(processes, tokenizer, self.extend) as pool:
            try:
                while True:
                    while len(waiting) < READ_AHEAD * processes:
                        position, texts = next(reading)
                        waiting.append((position, pool.submit(_encode, texts)))
                    position, future = waiting.popleft()
                    tokens = future.result()
                    yield _Chunk({**position, "offset": offset}, offset, tokens)
                    offset += len(tokens)
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
        """(position before them, some documents), without end: epoch after epoch."""
        epoch, state = self._position["epoch"], self._position["dataset"]
        while True:
            if state is not None:
                self.dataset.load_state_dict(state)
            skip = self.settings.held_out_documents if state is None else 0
            documents, found = texts_of(self.dataset, self.settings.field), 0
            for _ in range(skip):
                next(documents, None)
            while True:
                position = {"epoch": epoch, "dataset": self.dataset.state_dict() if skip or found or state else None}
                texts = list(islice(documents, CHUNK))
                if not texts:
                    break
                found += len(texts)
                yield position, texts
            if not found and state is None:
                raise UserError(
                    f"data.path={self.settings.path} has no document to train on beyond the held-out ones",
                    f"data.held_out_documents={self.settings.held_out_documents} is too many, or the data set is empty",
                )
            epoch, state = epoch + 1, None
            self.dataset.load_state_dict(self._fresh)


def texts_of(dataset: Any, field: str) -> Iterator[bytes]:
    """The documents of a data set.

    Raises:
        UserError: a row has no text in that column.
    """
    for row in dataset:
        text = row.get(field)
        if not isinstance(text, str):
            raise UserError(
                f"data.field={field}: a row has no text there, its columns are {', '.join(row)}", "data.field=COLUMN"
            )
        yield text.encode()


def _encode(texts: Sequence[bytes]) -> Tokens:
    """Documents as one piece of stream, an end-of-text before each."""
    tokenizer = workers.tokenizer()
    end = np.full(1, tokenizer.end_of_text, tokenizer.encode(b"").dtype)
    return np.concatenate([piece for text in texts for piece in (end, tokenizer.encode(text))])


def open_stream(data: DataSettings, extend: Sequence[str], context: int) -> tuple[Tokenizer, Source, StreamRows]:
    """The tokenizer, the source with its held-out documents, and the rows of a streamed data set.

    Raises:
        UserError: there is no such data set, or its rows have no text.
    """
    tokenizer = load_tokenizer(str(data.tokenizer), extend)
    dataset = open_dataset(str(data.path), data.split)
    held = list(islice(texts_of(dataset, data.field), data.held_out_documents))
    pieces = [np.full(1, tokenizer.end_of_text, tokenizer.encode(b"").dtype)]
    for text in held:
        pieces += [tokenizer.encode(text), pieces[0]]
    held_out = MemoryStore(np.concatenate(pieces if held else [pieces[0][:0]]))
    digest = hashlib.sha256(f"{data.path} {data.split} {data.field}".encode())
    for text in held:
        digest.update(text + b"\0")
    description = (
        f"{data.path}: streamed in its own order, without a shuffle (`rwkv-train prepare` makes a store, which is "
        f"shuffled); every rank reads all of it; held out: the first {len(held):,} documents, {len(held_out):,} tokens"
    )
    empty = MemoryStore(pieces[0][:0])
    source = Source("stream", empty, held_out, description, digest.hexdigest()[:16], 0, tokenizer.vocab_size - 1)
    rows = StreamRows(open_dataset(str(data.path), data.split), data, extend, context)
    return tokenizer, source, rows


def open_dataset(path: str, split: str) -> Any:
    """An IterableDataset: of local files (one, or a glob), or of the hub by its name.

    Raises:
        UserError: it cannot be opened.
    """
    import datasets

    files = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))
    files = [name for name in files if Path(name).is_file()]
    try:
        if files:
            kinds = {BUILDERS.get(next((s for s in Path(name).suffixes if s in BUILDERS), "")) for name in files}
            if len(kinds) > 1 or None in kinds:
                raise UserError(
                    f"data.path={path} names files of several or of unknown kinds", f"one kind of {', '.join(BUILDERS)}"
                )
            more = {"sample_by": "document"} if kinds == {"text"} else {}
            return datasets.load_dataset(kinds.pop(), data_files={split: files}, split=split, streaming=True, **more)
        return datasets.load_dataset(path, split=split, streaming=True)
    except UserError:
        raise
    except Exception as error:  # the library and the hub's client raise many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.path={path}: no local file and no data set that can be reached ({type(error).__name__}: {reason})",
            "data.path=FILES.jsonl (a glob), or the name of a data set on the hub and a connection to it",
        ) from None
