"""STORE.json next to STORE.bin and STORE.idx: content, tokenizer, sources and checksums of a token store."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rwkv_train.data.indexed import IndexedStore, store_file
from rwkv_train.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_train.errors import UserError
from rwkv_train.json_files import load_object, presentable

FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)  # 1: the fingerprint is without the offsets of the sequences


@dataclass(frozen=True)
class Manifest:
    """The content of STORE.json.

    Attributes:
        tokenizer: value of --tokenizer: bytes, world, or the path of a tokenizer.json.
        extend: texts that --extend made single tokens.
        identity: name and hash of the tokenizer.
        documents: number of documents.
        tokens: number of tokens, with an end-of-text per document.
        bytes: size of the documents' texts.
        largest_token: largest token in the store.
        fingerprint: IndexedStore.fingerprint of the store.
        sha256: SHA-256 of each file's content, by file name.
        sources: files, directories and data sets that were read, as they were typed.
        skipped: number of documents left out, by reason.
        version: version of rwkv-train that made the store.
        format: version of this file's format.
    """

    tokenizer: str
    extend: list[str]
    identity: str
    documents: int
    tokens: int
    bytes: int
    largest_token: int
    fingerprint: str
    sha256: dict[str, str]
    sources: list[str]
    skipped: dict[str, int] = field(default_factory=dict)
    version: str = ""
    format: int = FORMAT_VERSION

    def matches(self, store: IndexedStore) -> bool:
        """Whether a store has the fingerprint of this manifest."""
        return self.fingerprint == store.fingerprint(with_pointers=self.format > 1)

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that made the store.

        Raises:
            UserError: its file is missing, or has changed since.
        """
        tokenizer = load_tokenizer(self.tokenizer, self.extend)
        if tokenizer.identity != self.identity:
            raise UserError(
                f"the store was made with the tokenizer {self.identity}; {self.tokenizer} is {tokenizer.identity} now",
                "restore the original tokenizer file, or prepare the store again",
            )
        return tokenizer


def _is_of_type(value: Any, kind: str) -> bool:
    """Whether a value is of a type that a field of `Manifest` has; numbers are counts."""
    if kind == "int":
        return type(value) is int and 0 <= value < 2**63
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if kind.startswith("dict[str, "):
        inner = kind.removeprefix("dict[str, ").removesuffix("]")
        return isinstance(value, dict) and all(_is_of_type(one, inner) for one in value.values())
    return kind == "str" and isinstance(value, str)


def write_manifest(stem: Path, manifest: Manifest) -> None:
    store_file(stem, ".json").write_text(
        json.dumps(presentable(asdict(manifest)), indent=1, ensure_ascii=False), encoding="utf-8"
    )


def read_manifest(stem: Path) -> Manifest | None:
    """Reads the manifest of a store; None if it has none, like the stores of other tools.

    Raises:
        UserError: the file is not a manifest, or has another format version.
    """
    path = store_file(stem, ".json")
    if not path.is_file():
        return None
    try:
        content = load_object(path)
        if content["format"] not in _READ_VERSIONS:
            raise UserError(
                f"{path} has format {content['format']}, this version reads {' and '.join(map(str, _READ_VERSIONS))}",
                "update rwkv-train, or prepare the store again",
            )
        manifest = Manifest(**content)
        for each in fields(Manifest):
            if not _is_of_type(getattr(manifest, each.name), str(each.type)):
                raise ValueError(f"its {each.name} is not of the type {each.type}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the manifest of a store ({type(error).__name__}: {error})",
            "remove it and set data.tokenizer=…, or prepare the store again",
        ) from None
