"""A store looked at: `prepare inspect` tells what is in it, `prepare verify` reads every byte."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from rwkv_train.data.indexed import IndexedStore, beside
from rwkv_train.data.manifest import Manifest, read_manifest
from rwkv_train.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_train.errors import UserError

_SHOWN = 300  # characters of a document
_PART = 2**22  # documents or tokens that are looked at in one go


def inspect(path: Path, documents: list[int], tokenizer: str | None, console: Console) -> None:
    """Prints statistics of a store and the beginnings of some documents (none named: of three).

    Raises:
        UserError: the store cannot be opened, or a document is not in it.
    """
    store = IndexedStore(path)
    manifest = read_manifest(store.stem)
    known = load_tokenizer(tokenizer) if tokenizer else manifest.load_tokenizer() if manifest else None
    number = len(store.boundaries) - 1
    console.print(f"{store.stem}: {number:,} documents, {len(store):,} tokens, {store.dtype}")
    if manifest is not None:
        per_token = manifest.bytes / max(1, manifest.tokens)
        console.print(f"tokenizer {manifest.identity}, {manifest.bytes:,} bytes of text ({per_token:.2f} a token)")
        console.print(f"from {', '.join(manifest.sources)} by rwkv-train {manifest.version}")
        for why, count in manifest.skipped.items():
            console.print(f"left out: {count:,} documents, {why}")
    elif known is None:
        console.print(
            f"no manifest: --tokenizer NAME decodes its documents ({beside(store.stem, '.json').name} is missing)"
        )
    if number:
        lengths = store.documents()[1]
        named = zip(
            ("least", "10 %", "half", "90 %", "most"), np.percentile(lengths, [0, 10, 50, 90, 100]), strict=True
        )
        console.print(f"tokens of a document: {', '.join(f'{name} {int(cut):,}' for name, cut in named)}")
    for index in documents or sorted({0, number // 2, number - 1} if number else set()):
        if not 0 <= index < number:
            raise UserError(f"there is no document {index}", f"{store.stem} has 0 … {number - 1}")
        tokens = store.document(index)
        console.print(f"\n[bold]document {index:,}[/bold], {len(tokens):,} tokens")
        if known is not None:
            text = known.decode(tokens[:_SHOWN]).decode(errors="replace")[:_SHOWN]
            console.print(text.rstrip("\0"), markup=False)
        else:
            console.print(" ".join(map(str, tokens[:40])), markup=False)


@dataclass(frozen=True)
class Fault:
    """What `verify` found."""

    what: str
    remedy: str = "prepare the store anew, or copy it anew from where it is whole"


def verify(path: Path, tokenizer: str | None = None) -> Iterator[Fault]:
    """Every fault of a store, its files read whole.

    Raises:
        UserError: the files do not belong together, or one is cut short.
    """
    store = IndexedStore(path)
    manifest = read_manifest(store.stem)
    yield from _verify_index(store)
    known = load_tokenizer(tokenizer) if tokenizer else None if manifest is None else manifest.load_tokenizer()
    yield from _verify_tokens(store, known)
    if manifest is None:
        yield Fault(f"{store.stem} has no manifest, so its content could not be compared with what was written", "")
        return
    yield from _verify_content(store, manifest)


def _verify_index(store: IndexedStore) -> Iterator[Fault]:
    size, before = store.dtype.itemsize, 0
    for first in range(0, len(store.lengths), _PART):
        lengths = store.lengths[first : first + _PART].astype(np.int64)
        expected = before + np.cumsum(lengths) - lengths
        wrong = np.flatnonzero((store.pointers[first : first + _PART] != expected * size) | (lengths < 0))
        if len(wrong):
            yield Fault(f"{store.idx}: sequence {first + int(wrong[0]):,} does not begin where the one before it ends")
            return
        before += int(lengths.sum())
    edges = store.boundaries
    if len(edges) and (edges[0] != 0 or edges[-1] != len(store.lengths) or (np.diff(edges) < 0).any()):
        yield Fault(f"{store.idx}: the documents' boundaries are not in order")


def _verify_tokens(store: IndexedStore, tokenizer: Tokenizer | None) -> Iterator[Fault]:
    if tokenizer is None:
        return
    for first in range(0, len(store), _PART):
        tokens = store.tokens[first : first + _PART]
        wrong = np.flatnonzero((tokens >= tokenizer.vocab_size) | (tokens < 0))
        if len(wrong):
            at = first + int(wrong[0])
            yield Fault(
                f"{store.bin}, document {store.document_of(at):,}: token {at:,} is {store.tokens[at]}, the vocabulary "
                f"of {tokenizer.identity} has {tokenizer.vocab_size:,}"
            )
            return


def _verify_content(store: IndexedStore, manifest: Manifest) -> Iterator[Fault]:
    number = len(store.boundaries) - 1
    if (number, len(store)) != (manifest.documents, manifest.tokens):
        yield Fault(
            f"{store.stem} has {number:,} documents and {len(store):,} tokens, its manifest tells of "
            f"{manifest.documents:,} and {manifest.tokens:,}"
        )
        return
    checks_file, broken = beside(store.stem, ".crc"), 0
    if checks_file.is_file() and checks_file.stat().st_size == 4 * number:
        checks = np.fromfile(checks_file, np.uint32)
        for index in range(number):
            if zlib.crc32(store.document(index).tobytes()) != checks[index]:
                broken += 1
                starts = int(store.pointers[store.boundaries[index]]) // store.dtype.itemsize
                yield Fault(f"{store.bin}, document {index:,} (token {starts:,} on) is not what was written")
    else:
        yield Fault(f"{checks_file} is missing or cut short, so no document can be named")
    for file in (store.bin, store.idx):
        if file == store.bin and broken:
            continue
        with open(file, "rb") as content:
            digest = hashlib.sha256()
            while block := content.read(_PART):
                digest.update(block)
        if digest.hexdigest() != manifest.sha256.get(file.name, digest.hexdigest()):
            yield Fault(f"{file} has other content than was written (SHA-256)")
