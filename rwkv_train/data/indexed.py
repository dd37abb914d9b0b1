r"""Token stores on disk in Megatron-LM's format MMIDIDX: NAME.bin has the tokens and nothing else, NAME.idx the index.

    9 bytes   MMIDIDX\0\0
    uint64    version, 1
    uint8     token type: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    uint64    number of sequences S
    uint64    number of document boundaries D + 1
    int32[S]  number of tokens of each sequence
    int64[S]  byte offset of each sequence in NAME.bin
    int64[D + 1]  number of the first sequence of each document, then S

All values are little-endian. Like RWKV-LM and GPT-NeoX we write one sequence per document, with an end-of-text after
it. Both files are memory-mapped: opening a store takes the same time whatever its size.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import struct
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rwkv_train.data.arrays import Ints
from rwkv_train.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
TYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
STORE_SUFFIXES = (".bin", ".crc", ".json", ".idx")  # of a store made by `prepare`; the index last, it makes it valid
PARTS_SUFFIX, PLAN_FILE = ".parts", "plan"  # folder of an unfinished `prepare`, and a file that each of them has
_SAMPLED_PAGES = 64  # of a .bin, for its fingerprint
_PAGE_BYTES = 4096


def stem_of(path: Path) -> Path:
    """The path of a store without its suffix: NAME for NAME, NAME.bin and NAME.idx."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def store_file(stem: Path, suffix: str) -> Path:
    """One of a store's files: appends a suffix to NAME, which may contain dots."""
    return stem.with_name(stem.name + suffix)


def is_index(path: Path) -> bool:
    """Whether a file is the index of a token store.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class IndexedStore:
    """A token store on disk, read-only and memory-mapped.

    Args:
        path: NAME, NAME.bin or NAME.idx.
        check: whether to check a few pages of both files; `verify` checks all of them.

    Attributes:
        tokens: all tokens, (N,).
        lengths: number of tokens of each sequence, int32 (S,).
        pointers: byte offset of each sequence in NAME.bin, int64 (S,).
        boundaries: number of the first sequence of each document, then S; int64 (D + 1,).
        dtype: type of a token.
        note: what was missing in the index and is assumed; empty if nothing.

    Raises:
        UserError: a file is missing, truncated or not an index, the two files do not match, or what a few pages of them
            say is not consistent.
    """

    note = ""

    def __init__(self, path: Path, check: bool = True) -> None:
        self.stem = stem_of(path)
        self.bin, self.idx = store_file(self.stem, ".bin"), store_file(self.stem, ".idx")
        for file in (self.idx, self.bin):
            if not file.is_file():
                raise UserError(
                    f"there is no file {file}", f"copy both files of the store, {self.bin.name} and {self.idx.name}"
                )
        index = _map(self.idx)
        if len(index) < _HEADER.size or index[: len(MAGIC)] != MAGIC:
            raise UserError(
                f"{self.idx} is not the index of a token store (MMIDIDX)", "make a store with `rwkv-train prepare`"
            )
        _, version, code, sequences, boundaries = _HEADER.unpack_from(index)
        if version != 1 or code not in TYPES:
            raise UserError(
                f"{self.idx} has version {version} and token type {code}; supported are version 1 and types "
                f"{', '.join(map(str, TYPES))}",
                "make the store again with `rwkv-train prepare`",
            )
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if len(index) != expected:
            raise UserError(
                f"{self.idx} has {len(index):,} bytes, its {sequences:,} sequences need {expected:,}", _COPY_AGAIN
            )
        offset = _HEADER.size
        self.lengths = np.frombuffer(index, np.int32, sequences, offset)
        self.pointers = np.frombuffer(index, np.int64, sequences, offset + 4 * sequences)
        self.boundaries = np.frombuffer(index, np.int64, boundaries, offset + 12 * sequences)
        self.dtype = np.dtype(TYPES[code])
        size = self.bin.stat().st_size
        indexed = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if size != indexed:
            raise UserError(
                f"{self.bin} has {size:,} bytes, according to {self.idx.name} {indexed:,}: "
                + ("it is truncated" if size < indexed else "the files belong to different stores"),
                _COPY_AGAIN,
            )
        self.tokens = np.frombuffer(_map(self.bin), self.dtype)
        if not boundaries:
            self.boundaries = np.array([0, sequences] if sequences else [0], np.int64)
            self.note = f"{self.idx.name} has no document boundaries: the store is taken for one document"
        if check:
            self._check_samples()

    def _check_samples(self) -> None:
        """Refuses an index or tokens of which a few pages are wrong.

        Raises:
            UserError: naming the first wrong one.
        """
        for first, last in self._samples(len(self.boundaries), self.boundaries.itemsize):
            if fault := self.boundary_fault(first, last):
                raise UserError(fault, BOUNDARY_REMEDY)
        for first, last in self._samples(len(self.pointers), self.pointers.itemsize):
            if fault := self.sequence_fault(first, last):
                raise UserError(fault, _COPY_AGAIN)
        for first, last in self._samples(len(self.tokens), self.dtype.itemsize) if self.dtype.kind == "i" else ():
            if fault := self.token_fault(first, last):
                raise UserError(fault, "make the store again, without tokens that stand for no text (padding)")

    def boundary_fault(self, first: int, last: int) -> str:
        """What is wrong with the document boundaries first … last - 1; empty if nothing."""
        edges, sequences = self.boundaries[max(0, first - 1) : last], len(self.lengths)
        begin, end = int(self.boundaries[0]), int(self.boundaries[-1])
        if (begin, end) != (0, sequences):
            return (
                f"{self.idx}: its documents begin at sequence {begin:,} and end at {end:,}; it has the sequences 0 to "
                f"{sequences:,}"
            )
        if (np.diff(edges) < 0).any() or (edges < 0).any() or (edges > sequences).any():
            return f"{self.idx}: the document boundaries are not in ascending order"
        return ""

    def sequence_fault(self, first: int, last: int) -> str:
        """What is wrong with the sequences first … last - 1, each of which begins where the one before ends."""
        before = max(0, first - 1)
        lengths, pointers = self.lengths[before:last].astype(np.int64), self.pointers[before:last]
        expected = int(pointers[0] if first else 0) + (np.cumsum(lengths) - lengths) * self.dtype.itemsize
        wrong = np.flatnonzero((pointers != expected) | (lengths < 0))
        if len(wrong):
            number = before + int(wrong[0])
            if self.lengths[number] < 0:
                return f"{self.idx}: sequence {number:,} has {self.lengths[number]:,} tokens"
            return f"{self.idx}: sequence {number:,} does not begin at the end of the previous one"
        return ""

    def token_fault(self, first: int, last: int) -> str:
        """Which of the tokens first … last - 1 is negative; empty if none."""
        if not len(wrong := np.flatnonzero(self.tokens[first:last] < 0)):
            return ""
        offset = first + int(wrong[0])
        return f"{self.bin}, document {self.document_of(offset):,}: token {offset:,} is {self.tokens[offset]}"

    @staticmethod
    def _samples(count: int, size: int) -> Iterator[tuple[int, int]]:
        """Ranges of a few pages of an array of `count` values of `size` bytes: the first, the last, some between."""
        page = _PAGE_BYTES // size
        last = max(0, count - page)
        for offset in sorted({last * number // (_SAMPLED_PAGES - 1) for number in range(_SAMPLED_PAGES)}):
            yield offset, min(offset + page, count)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, out: Ints) -> None:
        out[...] = self.tokens[start : start + len(out)]

    def documents(self) -> tuple[Ints, Ints]:
        starts = self.pointers[self.boundaries[:-1]] // self.dtype.itemsize
        return starts, np.diff(starts, append=len(self.tokens))

    def document(self, number: int) -> npt.NDArray[Any]:
        """The tokens of a document, with its end-of-text."""
        first, last = self.boundaries[number : number + 2]
        begin = int(self.pointers[first])
        end = int(self.pointers[last - 1]) + int(self.lengths[last - 1]) * self.dtype.itemsize
        return self.tokens[begin // self.dtype.itemsize : end // self.dtype.itemsize]

    def document_of(self, token: int) -> int:
        """The number of the document that contains the token at this offset."""
        sequence = int(np.searchsorted(self.pointers, token * self.dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self.boundaries, sequence, side="right")) - 1

    def fingerprint(self, with_pointers: bool = True) -> str:
        """A hash over the sizes and a few pages of both files, 16 hexadecimal digits.

        It notices a store with different content; a single flipped bit only `rwkv-train prepare verify` finds.

        Args:
            with_pointers: whether the offsets of the sequences are in it; not in manifests of format 1.
        """
        digest = hashlib.sha256(f"{self.dtype} {len(self.tokens)} {len(self.lengths)}".encode())
        for array in (self.tokens, self.lengths, self.boundaries, *((self.pointers,) if with_pointers else ())):
            page = _PAGE_BYTES // array.itemsize
            last = max(0, len(array) - page)
            for number in range(_SAMPLED_PAGES):
                offset = last * number // (_SAMPLED_PAGES - 1)
                digest.update(array[offset : offset + page].tobytes())
        return digest.hexdigest()[:16]

    def sampled_maximum(self) -> int:
        """The largest token in a few pages."""
        pages = self._samples(len(self.tokens), self.dtype.itemsize)
        return max((int(self.tokens[first:last].max(initial=0)) for first, last in pages), default=0)


BOUNDARY_REMEDY = (
    "if stores were joined without their document boundaries, give the originals to data.path (a directory or a glob "
    "is one stream); or make the store again with `rwkv-train prepare`"
)
_COPY_AGAIN = "copy both files of the store again, or make it again with `rwkv-train prepare`"


def _map(path: Path) -> memoryview:
    """A file's content, mapped. No descriptor stays open: a run may read many stores, and a process has 1,024 or so.

    Raises:
        OSError: it cannot be mapped.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return memoryview(b"")
        if sys.version_info >= (3, 13):
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, trackfd=False))
        # before, Python's own mmap keeps a duplicate of the descriptor
        system = ctypes.CDLL(None, use_errno=True)
        system.mmap.restype = ctypes.c_void_p
        system.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        system.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        address = system.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        content = (ctypes.c_ubyte * size).from_address(address)
        weakref.finalize(content, system.munmap, address, size).atexit = False
        return memoryview(content).cast("B").toreadonly()


def write_index(path: Path, dtype: npt.DTypeLike, lengths: Callable[[], Iterable[npt.NDArray[np.int32]]]) -> None:
    """Writes and syncs the index of a .bin file that contains one sequence per document, without gaps.

    Args:
        path: NAME.idx.
        dtype: type of a token.
        lengths: returns the number of tokens of each document in blocks, int32; called once per column of the index.

    Raises:
        OSError: the file cannot be written.
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
