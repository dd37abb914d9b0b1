"""A unit made into a shard, in a process of its own: N.bin, N.npz and, the sign that it is whole, N.json."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from rwkv_train.data.prepare.units import Skipped, Unit
from rwkv_train.data.tokenizers import smallest
from rwkv_train.data.workers import tokenizer
from rwkv_train.errors import UserError

_FLUSH = 2**20  # tokens that wait before they are written


@dataclass
class Counts:
    """What is in a shard, or in several."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    largest_token: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.largest_token = max(self.largest_token, other.largest_token)
        self.skipped = dict(Counter(self.skipped) + Counter(other.skipped))


@dataclass(frozen=True)
class Shard:
    """Where a shard lies."""

    folder: Path
    number: int

    @property
    def bin(self) -> Path:
        return self.folder / f"{self.number:06}.bin"

    @property
    def documents(self) -> Path:
        """Lengths (D,) int32 and CRC-32 (D,) uint32 of the documents."""
        return self.folder / f"{self.number:06}.npz"

    @property
    def counts(self) -> Path:
        return self.folder / f"{self.number:06}.json"

    def read_counts(self) -> Counts | None:
        """None: the shard is not there, or not whole."""
        try:
            return Counts(**json.loads(self.counts.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def make_shard(unit: Unit, shard: Shard, stop: bool) -> Counts:
    """Tokenises a unit: each document's tokens and an end-of-text behind them.

    Args:
        stop: whether a document that is left out ends it all.

    Raises:
        UserError: such a document, if `stop`.
        OSError: the disk refused; nothing is left of the shard.
    """
    known = tokenizer()
    kind = np.dtype(smallest(known.vocab_size))
    end = np.full(1, known.end_of_text, kind).tobytes()
    counts, lengths, checks = Counts(), [], []
    waiting: list[bytes] = []
    size, bytes_ = 0, 0
    try:
        with open(shard.bin, "wb") as file:
            for document in unit.documents():
                if isinstance(document, Skipped):
                    if stop:
                        raise UserError(
                            f"{document.where}: a document that cannot be taken ({document.why})",
                            "mend it, or --broken skip leaves such documents out and counts them",
                        )
                    counts.skipped[document.why] = counts.skipped.get(document.why, 0) + 1
                    continue
                tokens = known.encode(document).astype(kind, copy=False)
                counts.largest_token = max(counts.largest_token, int(tokens.max(initial=0)))
                raw = tokens.tobytes() + end
                lengths.append(len(tokens) + 1)
                checks.append(zlib.crc32(raw))
                bytes_ += len(document)
                waiting.append(raw)
                size += len(tokens)
                if size >= _FLUSH:
                    file.write(b"".join(waiting))
                    waiting, size = [], 0
            file.write(b"".join(waiting))
        np.savez(shard.documents, lengths=np.array(lengths, np.int32), checks=np.array(checks, np.uint32))
        counts.documents, counts.tokens, counts.bytes = len(lengths), sum(lengths), bytes_
        aside = shard.counts.with_suffix(".writing")
        aside.write_text(json.dumps(asdict(counts)))
        aside.replace(shard.counts)
    except BaseException:
        for path in (shard.counts, shard.documents, shard.bin):
            path.unlink(missing_ok=True)
        raise
    return counts
