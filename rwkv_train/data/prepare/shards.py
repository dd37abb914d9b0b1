"""A unit of input tokenised into a shard by a worker process: N.bin, N.npz and N.json.

N.json is written last, so that it exists only for complete shards.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_train.data.bad_rows import MAX_NAMED, BadRows
from rwkv_train.data.prepare.skipped import HARMLESS, Skipped
from rwkv_train.data.prepare.units import Documents, Unit
from rwkv_train.data.tokenizers import token_dtype
from rwkv_train.data.workers import tokenizer
from rwkv_train.errors import UserError
from rwkv_train.json_files import load_object, reason_of

_BUFFERED_TOKENS = 2**20  # before they are written


@dataclass
class ShardCounts:
    """The content of a shard, or of several.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, with an end-of-text per document.
        bytes: size of the documents' texts.
        largest_token: largest token.
        skipped: number of documents left out, by reason.
        named: arguments of the first `Skipped`, without those that are empty or binary.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    largest_token: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    named: list[list[Any]] = field(default_factory=list)

    def add(self, other: ShardCounts) -> None:
        """Adds the counts of another shard."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.largest_token = max(self.largest_token, other.largest_token)
        self.skipped = dict(Counter(self.skipped) + Counter(other.skipped))
        self.named = (self.named + other.named)[:MAX_NAMED]

    def leave_out(self, document: Skipped) -> None:
        """Counts a document that is left out."""
        self.skipped[document.reason] = self.skipped.get(document.reason, 0) + 1
        if document.reason not in HARMLESS and len(self.named) < MAX_NAMED:
            self.named.append(list(astuple(document)))

    def bad_rows(self, limit: float) -> BadRows:
        """The documents that are left out though they should have a text."""
        bad = sum(count for reason, count in self.skipped.items() if reason not in HARMLESS)
        first = [Skipped(*arguments) for arguments in self.named] if bad else []
        named = [f"{document.line}: {document.reason}" for document in first]
        return BadRows(limit, "--max-bad-rows ", self.documents + bad, bad, named)


@dataclass(frozen=True)
class Shard:
    """The files of a shard.

    Attributes:
        folder: directory of the shards.
        number: number of the unit, from 0.
    """

    folder: Path
    number: int

    @property
    def bin(self) -> Path:
        """The tokens."""
        return self.folder / f"{self.number:06}.bin"

    @property
    def documents(self) -> Path:
        """An .npz with `lengths` in tokens, int32 (D,), and CRC-32 `checks`, uint32 (D,), of the documents."""
        return self.folder / f"{self.number:06}.npz"

    @property
    def counts(self) -> Path:
        """ShardCounts as JSON."""
        return self.folder / f"{self.number:06}.json"

    def read_counts(self) -> ShardCounts | None:
        """The counts of a complete shard; None if it is missing or incomplete."""
        try:
            return ShardCounts(**load_object(self.counts))
        except (OSError, ValueError, TypeError):
            return None


def _readable(unit: Unit) -> Documents:
    """The documents of a unit.

    Raises:
        UserError: a source cannot be read; it is not a file of the store that cannot be written.
    """
    try:
        yield from unit.documents()
    except OSError as error:  # also of pyarrow
        what = error.filename or getattr(unit, "path", "a source")
        raise UserError(f"{what} cannot be read: {reason_of(error)}", "copy it again, or leave it out") from None


def make_shard(unit: Unit, shard: Shard, stop_at_broken: bool) -> ShardCounts:
    """Tokenises a unit and writes its shard: the tokens of each document and an end-of-text after them.

    Args:
        unit: the documents.
        shard: the files to write.
        stop_at_broken: whether to fail at the first unusable document instead of leaving it out.

    Raises:
        UserError: a document is unusable, and `stop_at_broken` is set.
        OSError: a file cannot be written; the shard's files have been removed.
    """
    encoder = tokenizer()
    dtype = np.dtype(token_dtype(encoder.vocab_size))
    end = np.full(1, encoder.end_of_text, dtype).tobytes()
    counts, lengths, checks = ShardCounts(), [], []
    buffered: list[bytes] = []
    size, bytes_ = 0, 0
    try:
        with open(shard.bin, "wb") as file:
            for document in _readable(unit):
                if isinstance(document, Skipped):
                    if stop_at_broken:
                        raise UserError(
                            f"{document.where}: unusable document ({document.reason})",
                            "fix it, or leave such documents out with --broken skip",
                        )
                    counts.leave_out(document)
                    continue
                tokens = encoder.encode(document).astype(dtype, copy=False)
                counts.largest_token = max(counts.largest_token, int(tokens.max(initial=0)))
                raw = tokens.tobytes() + end
                lengths.append(len(tokens) + 1)
                checks.append(zlib.crc32(raw))
                bytes_ += len(document)
                buffered.append(raw)
                size += len(tokens)
                if size >= _BUFFERED_TOKENS:
                    file.write(b"".join(buffered))
                    buffered, size = [], 0
            file.write(b"".join(buffered))
        np.savez(shard.documents, lengths=np.array(lengths, np.int32), checks=np.array(checks, np.uint32))
        counts.documents, counts.tokens, counts.bytes = len(lengths), sum(lengths), bytes_
        temporary = shard.counts.with_suffix(".writing")
        temporary.write_text(json.dumps(asdict(counts)))
        temporary.replace(shard.counts)
    except BaseException:
        for path in (shard.counts, shard.documents, shard.bin):
            path.unlink(missing_ok=True)
        raise
    return counts
