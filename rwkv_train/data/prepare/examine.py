"""`prepare inspect` prints what a store contains, `prepare verify` reads every byte of it."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from rwkv_train.data.indexed import IndexedStore, store_file
from rwkv_train.data.manifest import Manifest, read_manifest
from rwkv_train.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_train.errors import UserError

_MAX_CHARACTERS_SHOWN = 300  # of a document
_BLOCK_SIZE = 2**22  # documents or tokens that are checked at once


def inspect(path: Path, documents: list[int], tokenizer: str | None, console: Console) -> None:
    """Prints statistics of a store and the beginnings of documents.

    Args:
        path: NAME, NAME.bin or NAME.idx.
        documents: numbers of the documents to print; empty: the first, the middle and the last one.
        tokenizer: decodes a store without manifest; None: the manifest's.
        console: where to print.

    Raises:
        UserError: the store cannot be opened, or has no document of that number.
    """
    store = IndexedStore(path)
    manifest = read_manifest(store.stem)
    decoder = load_tokenizer(tokenizer) if tokenizer else manifest.load_tokenizer() if manifest else None
    count = len(store.boundaries) - 1
    console.print(f"{store.stem}: {count:,} documents, {len(store):,} tokens, {store.dtype}")
    if store.note:
        console.print(store.note)
    if manifest is not None:
        per_token = manifest.bytes / max(1, manifest.tokens)
        console.print(f"tokenizer {manifest.identity}, {manifest.bytes:,} bytes of text ({per_token:.2f} a token)")
        console.print(f"from {', '.join(manifest.sources)} by rwkv-train {manifest.version}")
        for reason, skipped in manifest.skipped.items():
            console.print(f"left out: {skipped:,} documents, {reason}")
    elif decoder is None:
        console.print(
            f"no manifest ({store_file(store.stem, '.json').name}): --tokenizer NAME is needed to decode documents"
        )
    if count:
        lengths = store.documents()[1]
        named = zip(
            ("minimum", "10 %", "median", "90 %", "maximum"), np.percentile(lengths, [0, 10, 50, 90, 100]), strict=True
        )
        console.print(f"tokens per document: {', '.join(f'{name} {int(value):,}' for name, value in named)}")
    for index in documents or sorted({0, count // 2, count - 1} if count else set()):
        if not 0 <= index < count:
            raise UserError(f"{store.stem} has no document {index}", f"give a number from 0 to {count - 1}")
        tokens = store.document(index)
        console.print(f"\ndocument {index:,}, {len(tokens):,} tokens", style="bold")
        if decoder is not None:
            text = decoder.decode(tokens[:_MAX_CHARACTERS_SHOWN]).decode(errors="replace")[:_MAX_CHARACTERS_SHOWN]
            console.print(text.rstrip("\0"))
        else:
            console.print(" ".join(map(str, tokens[:40])))


@dataclass(frozen=True)
class StoreFault:
    """A finding of `verify`.

    Attributes:
        what: what is wrong, and where.
        remedy: what to do about it; empty for a note about something that could not be checked.
    """

    what: str
    remedy: str = "prepare the store again, or copy it again from an intact original"


def verify(path: Path, tokenizer: str | None = None) -> Iterator[StoreFault]:
    """Yields every fault of a store after reading both files completely.

    Args:
        path: NAME, NAME.bin or NAME.idx.
        tokenizer: for a store without manifest: bytes, world or a tokenizer.json.

    Raises:
        UserError: the store cannot be opened: its files do not match, or one is truncated.
    """
    store = IndexedStore(path, check=False)
    manifest = read_manifest(store.stem)
    faults = list(_verify_index(store))
    yield from faults
    if any(fault.remedy for fault in faults):
        return  # the documents are not where the index says
    loaded = load_tokenizer(tokenizer) if tokenizer else None if manifest is None else manifest.load_tokenizer()
    yield from _verify_tokens(store, loaded)
    if manifest is None:
        yield StoreFault(f"{store.stem} has no manifest, so its content could not be compared with checksums", "")
        return
    yield from _verify_content(store, manifest)


def _verify_index(store: IndexedStore) -> Iterator[StoreFault]:
    if store.note:
        yield StoreFault(store.note, "")
    for count, fault_of in ((len(store.lengths), store.sequence_fault), (len(store.boundaries), store.boundary_fault)):
        blocks = range(0, count, _BLOCK_SIZE)
        fault = next(filter(None, (fault_of(first, min(first + _BLOCK_SIZE, count)) for first in blocks)), "")
        if fault:
            yield StoreFault(fault)


def _verify_tokens(store: IndexedStore, tokenizer: Tokenizer | None) -> Iterator[StoreFault]:
    vocab_size = np.iinfo(np.int64).max if tokenizer is None else tokenizer.vocab_size
    for first in range(0, len(store), _BLOCK_SIZE):
        if fault := store.token_fault(first, first + _BLOCK_SIZE):
            yield StoreFault(fault)
            return
        wrong = np.flatnonzero(store.tokens[first : first + _BLOCK_SIZE] >= vocab_size)
        if len(wrong) and tokenizer is not None:
            offset = first + int(wrong[0])
            yield StoreFault(
                f"{store.bin}, document {store.document_of(offset):,}: token {offset:,} is {store.tokens[offset]}, the "
                f"vocabulary of {tokenizer.identity} has {tokenizer.vocab_size:,}"
            )
            return


def _verify_content(store: IndexedStore, manifest: Manifest) -> Iterator[StoreFault]:
    number = len(store.boundaries) - 1
    if (number, len(store)) != (manifest.documents, manifest.tokens):
        yield StoreFault(
            f"{store.stem} has {number:,} documents and {len(store):,} tokens, according to its manifest "
            f"{manifest.documents:,} and {manifest.tokens:,}"
        )
        return
    checks_file, broken = store_file(store.stem, ".crc"), 0
    if checks_file.is_file() and checks_file.stat().st_size == 4 * number:
        checks = np.fromfile(checks_file, np.uint32)
        for index in range(number):
            if zlib.crc32(store.document(index).tobytes()) != checks[index]:
                broken += 1
                start = int(store.pointers[store.boundaries[index]]) // store.dtype.itemsize
                yield StoreFault(f"{store.bin}, document {index:,} (from token {start:,} on) differs from its checksum")
    else:
        yield StoreFault(f"{checks_file} is missing or truncated, so damaged documents cannot be named")
    for file in (store.bin, store.idx):
        if file == store.bin and broken:
            continue
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != manifest.sha256.get(file.name, digest):
            yield StoreFault(f"{file} differs from its SHA-256 in the manifest")
