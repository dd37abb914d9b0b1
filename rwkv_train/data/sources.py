"""What `data=` names, opened: for each source its training and its held-out tokens, and the tokenizer they share."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rwkv_train.config import DataSettings
from rwkv_train.data.chat import read_chat
from rwkv_train.data.corpus import join, read_corpus
from rwkv_train.data.indexed import IndexedStore, beside, stem_of
from rwkv_train.data.manifest import Manifest, read_manifest
from rwkv_train.data.store import Joined, MemoryStore, Part, Store
from rwkv_train.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_train.errors import UserError

_MEASURED = 2**18  # held-out tokens that are decoded to see how many bytes they stand for


@dataclass(frozen=True)
class Source:
    """One source of tokens.

    Attributes:
        description: one line for people.
        digest: hash of the content and its split, 16 hexadecimal digits.
        largest_token: the largest one in the source, as far as is known without reading it all.
    """

    name: str
    train: Store
    held_out: Store
    description: str
    digest: str
    largest_token: int
    bound: int  # no token is larger, for certain

    def bytes_per_token(self, tokenizer: Tokenizer) -> float:
        """Of the held-out tokens (of the training tokens if there are none), an end-of-text counted as one byte."""
        store = self.held_out if len(self.held_out) else self.train
        tokens = np.empty(min(len(store), _MEASURED), np.int64)
        store.read(0, tokens)
        text = tokens[tokens != tokenizer.end_of_text]
        return (len(tokenizer.decode(text)) + len(tokens) - len(text)) / max(1, len(tokens))


def open_sources(data: DataSettings, extend: Sequence[str] = ()) -> tuple[Tokenizer, list[Source]]:
    """Opens everything that `data` names.

    Raises:
        UserError: a source is missing, torn, or made with another tokenizer than the others.
    """
    if data.source == "mixture":
        parts = [(source.name, replace(data, path=source.path)) for source in data.sources]
    else:
        parts = [(data.source, data)]
    tokenizer = find_tokenizer(data, extend, [paths for _, part in parts if (paths := store_stems(part))])
    return tokenizer, [_open(name, part, tokenizer) for name, part in parts]


def stores_of(data: DataSettings) -> list[list[Path]]:
    """The stores of each source that is one, as paths without their endings."""
    paths = [source.path for source in data.sources] if data.source == "mixture" else [data.path]
    return [stems for path in paths if (stems := store_stems(replace(data, path=path)))]


def find_tokenizer(data: DataSettings, extend: Sequence[str], stores: Sequence[Sequence[Path]]) -> Tokenizer:
    """The tokenizer that is asked for, or that the stores were made with.

    Raises:
        UserError: they are different ones, or nothing tells which.
    """
    made = {stem: manifest for stems in stores for stem in stems if (manifest := read_manifest(stem)) is not None}
    first: Manifest | None = next(iter(made.values()), None)
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer, extend)
    elif first is not None:
        tokenizer = first.load_tokenizer()
        if extend and tuple(extend) != tuple(first.extend):
            tokenizer = load_tokenizer(first.tokenizer, extend)
    elif stores:
        raise UserError(
            f"{stores[0][0]} has no manifest ({stores[0][0].name}.json), so nothing tells which tokenizer made it",
            "data.tokenizer=world (or bytes, or the tokenizer.json): the one that it was made with",
        )
    else:
        tokenizer = load_tokenizer("bytes", extend)
    for stem, manifest in made.items():
        grown = tokenizer.identity.split("+")[0] == manifest.identity  # tokens of its own are no other tokens
        if tokenizer.identity != manifest.identity and not grown:
            raise UserError(
                f"{stem} was made with the tokenizer {manifest.identity}, the run's is {tokenizer.identity}",
                "leave data.tokenizer out, or prepare the store with that tokenizer",
            )
    return tokenizer


def store_stems(data: DataSettings) -> list[Path]:
    """The stores that `data.path` names: one, those of a directory, or those of a glob; none: it names text.

    Raises:
        UserError: a glob or a directory in which there is no store.
    """
    if data.source not in ("store", "mixture") or data.path is None:
        return []
    path = Path(data.path).expanduser()
    if beside(stem_of(path), ".idx").exists() or beside(stem_of(path), ".bin").exists():
        return [stem_of(path)]
    if path.is_dir():
        found = sorted(file.with_suffix("") for file in path.glob("*.idx"))
    else:
        found = sorted({stem_of(Path(name)) for name in glob.glob(str(path)) if name.endswith((".idx", ".bin"))})
        found = found or sorted({Path(name).with_suffix("") for name in glob.glob(f"{path}.idx")})
    if not found and (data.source == "store" or not path.exists()):
        name = stem_of(path).name
        what = " holds no store: no file in it ends in .idx" if path.is_dir() else " is no store"
        raise UserError(
            f"data.path={data.path}" + (what if path.exists() else f": there is no store {name}.bin and {name}.idx"),
            "`rwkv-train prepare TEXT --tokenizer world --out STORE` makes one; data=text reads text",
        )
    return found


def _open(name: str, data: DataSettings, tokenizer: Tokenizer) -> Source:
    if stems := store_stems(data):
        return _open_stores(name, stems, data, tokenizer)
    if data.source == "mixture":
        data = replace(data, source="text")  # it may have text as well
    if data.source == "chat":
        train, held_out, description, digest = read_chat(data, tokenizer)
    else:
        corpus = read_corpus(data)
        train, held_out = join(corpus.train, tokenizer), join(corpus.held_out, tokenizer)
        description, digest = corpus.description, corpus.digest
    largest = max(int(store.tokens.max(initial=0)) for store in (train, held_out))
    return Source(name, train, held_out, description, digest, largest, largest)


def _open_stores(name: str, stems: Sequence[Path], data: DataSettings, tokenizer: Tokenizer) -> Source:
    opened = [IndexedStore(stem) for stem in stems]
    manifests = [read_manifest(stem) for stem in stems]
    digest, largest, bound = hashlib.sha256(f"{data.hold_out}".encode()), 0, 0
    for store, manifest in zip(opened, manifests, strict=True):
        fingerprint = store.fingerprint()
        digest.update(fingerprint.encode())
        if manifest is not None and manifest.fingerprint != fingerprint:
            raise UserError(
                f"{store.bin} is not what its manifest {store.stem.name}.json tells of: fingerprint {fingerprint}, not "
                f"{manifest.fingerprint}",
                f"`rwkv-train prepare verify {store.stem}` says what differs; or remove the manifest of another store",
            )
        largest = max(largest, store.sampled_maximum() if manifest is None else manifest.largest_token)
        bound = max(bound, int(np.iinfo(store.dtype).max) if manifest is None else manifest.largest_token)
        refuse_large(largest, tokenizer.vocab_size, f"{store.bin}")
    whole: Store = opened[0] if len(opened) == 1 else Joined(opened)
    cut = _cut(opened, data.hold_out)
    held_out = Part(whole, cut - 1, len(whole)) if 0 < cut < len(whole) else MemoryStore(np.zeros(0, np.uint16))
    documents = sum(len(store.boundaries) - 1 for store in opened)
    many = f" in {len(stems)} stores" if len(stems) > 1 else ""
    description = (
        f"{data.path}: {documents:,} documents, {len(whole):,} tokens ({tokenizer.identity}){many}, hash "
        f"{digest.hexdigest()[:16]}; held out: the last {max(0, len(held_out) - 1):,} tokens"
    )
    return Source(name, Part(whole, 0, cut), held_out, description, digest.hexdigest()[:16], largest, bound)


def _cut(stores: Sequence[IndexedStore], share: float) -> int:
    """The first token that is held out: the first of a document; all tokens where nothing is."""
    total = sum(len(store) for store in stores)
    if not share or not total:
        return total
    wanted = total - round(share * total)
    begin: int = 0
    for store in stores:
        inside = max(0, wanted - begin)
        if inside < len(store):
            starts = store.pointers  # documents begin where sequences begin; looked up without reading all
            sequence = int(np.searchsorted(starts, inside * store.dtype.itemsize))
            number = int(np.searchsorted(store.boundaries, sequence))
            if number < len(store.boundaries) - 1:
                return begin + int(starts[store.boundaries[number]]) // int(store.dtype.itemsize)
        begin += len(store)
    last = int(stores[-1].pointers[stores[-1].boundaries[-2]]) // stores[-1].dtype.itemsize
    return total - len(stores[-1]) + last or total  # the last document reaches into what is wanted: it is held out


def refuse_large(token: int, vocab_size: int, where: str) -> None:
    """Raises a UserError if a token is not in the vocabulary."""
    if token >= vocab_size:
        raise UserError(
            f"{where} holds the token {token}; the vocabulary has {vocab_size:,}",
            "the store was made with another tokenizer: data.tokenizer=…, or model.vocab_size=…",
        )
