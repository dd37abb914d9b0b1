"""Opens what `data=` names: training and held-out tokens of each source, and their common tokenizer."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rwkv_train.config import DataSettings
from rwkv_train.data.arrays import Ints
from rwkv_train.data.chat import read_chat
from rwkv_train.data.corpus import join, read_corpus
from rwkv_train.data.indexed import IndexedStore, stem_of, store_file
from rwkv_train.data.learned import LearnedTokenizer, learn, learned_size
from rwkv_train.data.manifest import Manifest, read_manifest
from rwkv_train.data.rows import BatchArrays
from rwkv_train.data.store import JoinedStore, MemoryStore, Store, StoreSlice
from rwkv_train.data.tokenizers import Tokenizer, extended, load_tokenizer
from rwkv_train.errors import UserError
from rwkv_train.user_path import user_path


@dataclass(frozen=True)
class DataSource:
    """A source of tokens: text, conversations, token stores or a stream.

    Attributes:
        name: name of the source.
        train: training tokens.
        held_out: validation tokens.
        description: one line for the log.
        digest: hash of the content and its split, 16 hexadecimal digits.
        largest_token: largest token found without reading the complete source.
        bound: no token of the source is larger.
    """

    name: str
    train: Store
    held_out: Store
    description: str
    digest: str
    largest_token: int
    bound: int


def open_sources(
    data: DataSettings, extend: Sequence[str] = (), learned: LearnedTokenizer | None = None
) -> tuple[Tokenizer, list[DataSource]]:
    """Opens all sources that `data` names.

    Args:
        data: the data settings.
        extend: texts that become single tokens (`vocab.extend`).
        learned: the tokenizer that the run has learnt before; None: with data.tokenizer=bpe:SIZE it is learnt now.

    Returns:
        The common tokenizer, and the sources.

    Raises:
        UserError: a source is missing or damaged, or its tokenizer differs from the others'.
    """
    if data.source == "mixture":
        parts = [(source.name, replace(data, path=source.path)) for source in data.sources]
    else:
        parts = [(data.source, data)]
    if learned is None and learned_vocabulary(data) is not None:
        learned = learn(str(data.tokenizer), (document.text for document in read_corpus(data).train))
    if learned is not None:
        tokenizer = extended(learned, extend)
        return tokenizer, [_open(name, part, tokenizer) for name, part in parts]
    tokenizer = find_tokenizer(data, extend, [paths for _, part in parts if (paths := store_stems(part))])
    return tokenizer, [_open(name, part, tokenizer) for name, part in parts]


def stores_of(data: DataSettings) -> list[list[Path]]:
    """The token stores of each source that has some, as paths without suffix."""
    paths = [source.path for source in data.sources] if data.source == "mixture" else [data.path]
    return [stems for path in paths if (stems := store_stems(replace(data, path=path)))]


def learned_vocabulary(data: DataSettings) -> int | None:
    """The size of the vocabulary that is learnt from the training text; None: data.tokenizer asks for no such one.

    Raises:
        UserError: the size is not possible, or the data is not plain text.
    """
    size = learned_size(data.tokenizer)
    if size is not None and data.source not in ("stdlib", "text"):
        raise UserError(
            f"data.tokenizer={data.tokenizer} is learnt from plain text, and not from data={data.source}",
            "give world, bytes or the path of a tokenizer.json; a run on data=text leaves one in its directory",
        )
    return size


def vocabulary_of(data: DataSettings, extend: Sequence[str]) -> tuple[str, int]:
    """Name of the tokenizer and number of tokens, added ones included; nothing is learnt for it.

    Raises:
        UserError: as `find_tokenizer`.
    """
    size = learned_vocabulary(data)
    if size is not None:
        return str(data.tokenizer), size + len(extend)
    tokenizer = find_tokenizer(data, extend, stores_of(data))
    return tokenizer.name, tokenizer.vocab_size


def find_tokenizer(data: DataSettings, extend: Sequence[str], stores: Sequence[Sequence[Path]]) -> Tokenizer:
    """Loads the tokenizer that `data.tokenizer` names, or else the one that the stores were made with.

    Args:
        data: the data settings.
        extend: texts that become single tokens (`vocab.extend`).
        stores: the stores of each source, as paths without suffix.

    Raises:
        UserError: the stores were made with different tokenizers, or have no manifest and no tokenizer is set.
    """
    manifests = {stem: manifest for stems in stores for stem in stems if (manifest := read_manifest(stem)) is not None}
    first: Manifest | None = next(iter(manifests.values()), None)
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer, extend)
    elif first is not None:
        tokenizer = first.load_tokenizer()
        if extend and tuple(extend) != tuple(first.extend):
            tokenizer = load_tokenizer(first.tokenizer, extend)
    elif stores:
        raise UserError(
            f"{stores[0][0]} has no manifest ({stores[0][0].name}.json) that names its tokenizer",
            "set data.tokenizer to the one it was made with: world, bytes, or the path of a tokenizer.json",
        )
    else:
        tokenizer = load_tokenizer("bytes", extend)
    for stem, manifest in manifests.items():
        is_extension = tokenizer.identity.split("+")[0] == manifest.identity  # it has the store's tokens, and more
        if tokenizer.identity != manifest.identity and not is_extension:
            raise UserError(
                f"{stem} was made with the tokenizer {manifest.identity}, the run's is {tokenizer.identity}",
                "remove data.tokenizer, or prepare the store again with that tokenizer",
            )
    return tokenizer


def store_stems(data: DataSettings) -> list[Path]:
    """The stores that `data.path` names: one, those of a directory, or those of a glob; empty if it names text.

    Raises:
        UserError: `data=store`, but there is no store; or the path of a mixture's source does not exist.
    """
    if data.source not in ("store", "mixture") or data.path is None:
        return []
    path = user_path(data.path)
    if store_file(stem_of(path), ".idx").exists() or store_file(stem_of(path), ".bin").exists():
        return [stem_of(path)]
    if path.is_dir():
        found = sorted(file.with_suffix("") for file in path.glob("*.idx"))
    else:
        found = sorted({stem_of(Path(name)) for name in glob.glob(str(path)) if name.endswith((".idx", ".bin"))})
        found = found or sorted({Path(name).with_suffix("") for name in glob.glob(f"{path}.idx")})
    if not found and (data.source == "store" or not path.exists()):
        name = stem_of(path).name
        what = " contains no store: it has no .idx file" if path.is_dir() else " is not a store"
        raise UserError(
            f"data.path={data.path}" + (what if path.exists() else f": there is no store {name}.bin and {name}.idx"),
            "make one with `rwkv-train prepare TEXT --tokenizer world --out STORE`, or read text with data=text",
        )
    return found


def _open(name: str, data: DataSettings, tokenizer: Tokenizer) -> DataSource:
    if stems := store_stems(data):
        return _open_stores(name, stems, data, tokenizer)
    if data.source == "mixture":
        data = replace(data, source="text")
    if data.source == "chat":
        train, held_out, description, digest = read_chat(data, tokenizer)
    else:
        corpus = read_corpus(data)
        train, held_out = join(corpus.train, tokenizer), join(corpus.held_out, tokenizer)
        description, digest = corpus.description, corpus.digest
    largest = max(int(store.tokens.max(initial=0)) for store in (train, held_out))
    return DataSource(name, train, held_out, description, digest, largest, largest)


def _open_stores(name: str, stems: Sequence[Path], data: DataSettings, tokenizer: Tokenizer) -> DataSource:
    opened = [IndexedStore(stem) for stem in stems]
    manifests = [read_manifest(stem) for stem in stems]
    digest, largest, bound = hashlib.sha256(f"{data.hold_out}".encode()), 0, 0
    for store, manifest in zip(opened, manifests, strict=True):
        fingerprint = store.fingerprint()
        digest.update(fingerprint.encode())
        if manifest is not None and not manifest.matches(store):
            raise UserError(
                f"{store.bin} does not match its manifest {store.stem.name}.json: fingerprint {fingerprint}, not "
                f"{manifest.fingerprint}",
                f"`rwkv-train prepare verify {store.stem}` shows what differs; remove the manifest if it belongs to "
                "another store",
            )
        largest = max(largest, store.sampled_maximum() if manifest is None else manifest.largest_token)
        unknown = int(np.iinfo(np.int64 if store.dtype.kind == "i" else store.dtype).max)  # or negative
        bound = max(bound, unknown if manifest is None else manifest.largest_token)
        check_token_in_vocabulary(largest, tokenizer.vocab_size, f"{store.bin}")
    stream: Store = opened[0] if len(opened) == 1 else JoinedStore(opened)
    cut, inside = _cut(opened, data.hold_out)
    if inside:
        digest.update(f"{cut}".encode())  # the share alone says where the split is in other stores
    held_out = (
        StoreSlice(stream, cut - 1, len(stream), inside)
        if 0 < cut < len(stream)
        else MemoryStore(np.zeros(0, np.uint16))
    )
    documents = sum(len(store.boundaries) - 1 for store in opened)
    many = f" in {len(stems)} stores" if len(stems) > 1 else ""
    held = max(0, len(held_out) - 1)
    share = f" ({held / max(1, len(stream)):.2%}; they begin inside a document)" if inside else ""
    description = (
        f"{data.path}: {documents:,} documents, {len(stream):,} tokens ({tokenizer.identity}){many}, hash "
        f"{digest.hexdigest()[:16]}; held out: the last {held:,} tokens{share}"
    )
    description += "".join(f"; {store.note}" for store in opened if store.note)
    train = StoreSlice(stream, 0, cut, inside)
    return DataSource(name, train, held_out, description, digest.hexdigest()[:16], largest, bound)


def _cut(stores: Sequence[IndexedStore], share: float) -> tuple[int, bool]:
    """Where the held-out tokens begin: with a document, if one begins about there.

    Returns:
        Offset of the first held-out token, the number of tokens if none is held out; and whether it is inside a
        document, because no document begins where between half of the share and twice the share would be held out.
    """
    total = sum(len(store) for store in stores)
    wanted = round(share * total)
    if not wanted:
        return total, False
    for begin in _starts_around(stores, total - wanted):
        if wanted <= 2 * (total - begin) <= 4 * wanted and begin:
            return begin, False
    return max(1, total - wanted), True


def _starts_around(stores: Sequence[IndexedStore], target: int) -> list[int]:
    """Offsets of the first document that begins at a token or after it, and of the last one before it, if any."""
    after, before, begin = [], [], 0
    for store in stores:
        size = store.dtype.itemsize  # documents begin where sequences do: a binary search reads little
        sequence = int(np.searchsorted(store.pointers, max(0, target - begin) * size))
        number = int(np.searchsorted(store.boundaries[:-1], sequence))
        if number < len(store.boundaries) - 1:
            first = int(store.boundaries[number])
            if first < len(store.pointers):
                after.append(begin + int(store.pointers[first]) // size)
        if number:
            before.append(begin + int(store.pointers[store.boundaries[number - 1]]) // size)
        begin += len(store)
    return after[:1] + [start for start in before[-1:] if start < target]


def digest_of(sources: Sequence[DataSource]) -> str:
    """Hash of the content and the split of all sources, 16 hexadecimal digits."""
    digests = [source.digest for source in sources]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


def check_rows_in_vocabulary(
    block: BatchArrays, sources: Sequence[DataSource], numbers: Ints, offsets: Ints, vocab_size: int
) -> None:
    """Refuses rows with a token outside the vocabulary.

    Args:
        block: the rows.
        sources: of the run.
        numbers, offsets: (B,), source and offset of each row, for the message.
        vocab_size: size of the vocabulary.

    Raises:
        UserError: a token ≥ vocab_size, or a negative one.
    """
    if all(source.bound < vocab_size for source in sources):
        return
    outside = (block.tokens < 0) | (block.tokens >= vocab_size)
    if outside.any():
        row = int(outside.any(axis=1).argmax())
        where = f"{sources[int(numbers[row])].name}, sample at token {int(offsets[row]):,},"
        check_token_in_vocabulary(int(block.tokens[row][outside[row]][0]), vocab_size, where)


def check_token_in_vocabulary(token: int, vocab_size: int, where: str) -> None:
    """Refuses a token outside the vocabulary.

    Args:
        token: a token of the data.
        vocab_size: size of the vocabulary.
        where: file or source, for the message.

    Raises:
        UserError: token ≥ vocab_size, or negative.
    """
    if token < 0:
        raise UserError(
            f"{where} contains the token {token}",
            "make the store again, without tokens that stand for no text (padding)",
        )
    if token >= vocab_size:
        raise UserError(
            f"{where} contains the token {token}; the vocabulary has {vocab_size:,}",
            "set data.tokenizer to the one the store was made with, or raise model.vocab_size",
        )
