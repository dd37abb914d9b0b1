r"""The field's token store: NAME.bin (the tokens, nothing else) and NAME.idx, Megatron-LM's "MMIDIDX".

    9 bytes   MMIDIDX\0\0
    uint64    version, 1
    uint8     type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    uint64    number of sequences S
    uint64    number of document boundaries D + 1
    int32[S]  tokens of each sequence
    int64[S]  the byte in NAME.bin at which each sequence begins
    int64[D + 1]  the sequence with which each document begins, and S

Everything is little-endian. RWKV-LM and GPT-NeoX write one sequence a document, with an end-of-text behind it, and so
do we. Both files are mapped into memory: opening one costs the same whatever its size.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rwkv_train.errors import UserError

Ints = npt.NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
TYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_SAMPLED = 64  # places of a .bin that its fingerprint looks at
_PAGE = 4096


def stem_of(path: Path) -> Path:
    """NAME for NAME, NAME.bin and NAME.idx."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def beside(stem: Path, suffix: str) -> Path:
    """NAME.suffix; a dot in NAME is no suffix."""
    return stem.with_name(stem.name + suffix)


class IndexedStore:
    """A store on disk, read-only.

    Attributes:
        tokens: (N,) all tokens, mapped.
        lengths, pointers: (S,) of the sequences: tokens, and where each begins in bytes; mapped.
        boundaries: (D + 1,) the sequence that each document begins with, and S; mapped.

    Raises:
        UserError: a file is missing, torn, no index, or they do not belong together.
    """

    def __init__(self, path: Path) -> None:
        self.stem = stem_of(path)
        self.bin, self.idx = beside(self.stem, ".bin"), beside(self.stem, ".idx")
        for file in (self.idx, self.bin):
            if not file.is_file():
                raise UserError(
                    f"there is no file {file}", f"a store is two files, {self.bin.name} and {self.idx.name}: copy both"
                )
        index = _map(self.idx)
        if len(index) < _HEADER.size or index[: len(MAGIC)] != MAGIC:
            raise UserError(f"{self.idx} is no index of a token store (MMIDIDX)", "`rwkv-train prepare` makes one")
        _, version, code, sequences, boundaries = _HEADER.unpack_from(index)
        if version != 1 or code not in TYPES:
            raise UserError(
                f"{self.idx} has version {version} and token type {code}; known are version 1 and types "
                f"{', '.join(map(str, TYPES))}",
                "write it anew with `rwkv-train prepare`",
            )
        wanted = _HEADER.size + 12 * sequences + 8 * boundaries
        if len(index) != wanted:
            raise UserError(
                f"{self.idx} has {len(index):,} bytes, its {sequences:,} sequences need {wanted:,}", _COPY_ANEW
            )
        at = _HEADER.size
        self.lengths = np.frombuffer(index, np.int32, sequences, at)
        self.pointers = np.frombuffer(index, np.int64, sequences, at + 4 * sequences)
        self.boundaries = np.frombuffer(index, np.int64, boundaries, at + 12 * sequences)
        self.dtype = np.dtype(TYPES[code])
        size = self.bin.stat().st_size
        told = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if size != told:
            raise UserError(
                f"{self.bin} has {size:,} bytes, {self.idx.name} tells of {told:,}: "
                + ("it is cut short" if size < told else "the one is not the other's"),
                _COPY_ANEW,
            )
        self.tokens = np.frombuffer(_map(self.bin) if size else b"", self.dtype)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, out: Ints) -> None:
        out[...] = self.tokens[start : start + len(out)]

    def documents(self) -> tuple[Ints, Ints]:
        starts = self.pointers[self.boundaries[:-1]] // self.dtype.itemsize
        return starts, np.diff(starts, append=len(self.tokens))

    def document(self, number: int) -> npt.NDArray[Any]:
        """The tokens of one document."""
        first, last = self.boundaries[number : number + 2]
        begin = int(self.pointers[first])
        end = int(self.pointers[last - 1]) + int(self.lengths[last - 1]) * self.dtype.itemsize
        return self.tokens[begin // self.dtype.itemsize : end // self.dtype.itemsize]

    def document_of(self, token: int) -> int:
        """The document that holds a token."""
        sequence = int(np.searchsorted(self.pointers, token * self.dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self.boundaries, sequence, side="right")) - 1

    def fingerprint(self) -> str:
        """A hash over sizes and a few pages of both files: another content is noticed, a flipped bit is `verify`'s."""
        digest = hashlib.sha256(f"{self.dtype} {len(self.tokens)} {len(self.lengths)}".encode())
        for array in (self.tokens, self.lengths, self.boundaries):
            page = _PAGE // array.itemsize
            last = max(0, len(array) - page)
            for place in range(_SAMPLED):
                at = last * place // (_SAMPLED - 1)
                digest.update(array[at : at + page].tobytes())
        return digest.hexdigest()[:16]

    def sampled_maximum(self) -> int:
        """The largest token among a few pages."""
        page = _PAGE // self.dtype.itemsize
        last = max(0, len(self.tokens) - page)
        places = {last * place // (_SAMPLED - 1) for place in range(_SAMPLED)}
        return max(int(self.tokens[at : at + page].max(initial=0)) for at in places)


_COPY_ANEW = "copy both files of the store anew, or make it again with `rwkv-train prepare`"


def _map(path: Path) -> mmap.mmap | bytes:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def write_index(path: Path, dtype: npt.DTypeLike, lengths: Callable[[], Iterable[npt.NDArray[np.int32]]]) -> None:
    """Writes and syncs the index of a .bin whose sequences are documents and lie one behind the other.

    Args:
        path: NAME.idx.
        dtype: of a token.
        lengths: gives the tokens of each document, in parts; called for each of the index's columns.
    """
    kind = np.dtype(dtype)
    code = next(code for code, known in TYPES.items() if np.dtype(known) == kind)
    count = sum(len(part) for part in lengths())
    with open(path, "wb") as file:
        file.write(_HEADER.pack(MAGIC, 1, code, count, count + 1))
        for part in lengths():
            file.write(np.ascontiguousarray(part, np.int32).tobytes())
        before = 0
        for part in lengths():
            ends = before + np.cumsum(part, dtype=np.int64)
            file.write(((ends - part) * kind.itemsize).tobytes())
            before = int(ends[-1]) if len(ends) else before
        for first in range(0, count + 1, 2**20):
            file.write(np.arange(first, min(first + 2**20, count + 1), dtype=np.int64).tobytes())
        file.flush()
        os.fsync(file.fileno())
