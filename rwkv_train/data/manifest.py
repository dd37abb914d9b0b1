"""STORE.json, beside STORE.bin and STORE.idx: what is in a store, who made it of what, and its checksums."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rwkv_train.data.indexed import beside
from rwkv_train.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_train.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What STORE.json holds."""

    tokenizer: str  # as --tokenizer names it
    extend: list[str]
    identity: str  # of the tokenizer: its name and a hash
    documents: int
    tokens: int
    bytes: int  # of the text
    largest_token: int
    fingerprint: str  # IndexedStore.fingerprint
    sha256: dict[str, str]  # file name → of its content
    sources: list[str]
    skipped: dict[str, int] = field(default_factory=dict)  # why → how many documents
    version: str = ""  # of rwkv-train
    format: int = FORMAT

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store.

        Raises:
            UserError: it is not here, or it is another one by now.
        """
        tokenizer = load_tokenizer(self.tokenizer, self.extend)
        if tokenizer.identity != self.identity:
            raise UserError(
                f"the store was made with the tokenizer {self.identity}; {self.tokenizer} is {tokenizer.identity} now",
                "bring back the tokenizer's file as it was, or prepare the store anew",
            )
        return tokenizer


def write_manifest(stem: Path, manifest: Manifest) -> None:
    beside(stem, ".json").write_text(json.dumps(asdict(manifest), indent=1, ensure_ascii=False), encoding="utf-8")


def read_manifest(stem: Path) -> Manifest | None:
    """The manifest of a store; None: it has none, as other tools' stores.

    Raises:
        UserError: the file is no manifest, or of a later version.
    """
    path = beside(stem, ".json")
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(
                f"{path} has format {content['format']}, this version reads {FORMAT}",
                "update rwkv-train, or prepare anew",
            )
        return Manifest(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no manifest of a store ({type(error).__name__}: {error})",
            "move it away: a store without one needs data.tokenizer=…",
        ) from None
