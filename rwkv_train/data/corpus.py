"""Text files to train on: which ones, in which order, and which of them are held out.

Everything here is a function of the files alone: they are taken in the order of their names, and a hash of its name
says whether a file is held out, so that a new file moves no other one between training and validation.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_train.config import DataSettings
from rwkv_train.data.store import MemoryStore
from rwkv_train.data.tokenizers import Tokenizer
from rwkv_train.errors import UserError

# Of the standard library, what has near-copies of itself elsewhere in it (character tables, the tests, the generated
# build description): held out, it would be known by heart.
LIBRARY_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "lib2to3", "idlelib"}
LIBRARY_GENERATED = "_sysconfigdata_"


@dataclass(frozen=True)
class Document:
    name: str  # path below the root, with /
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents, shared out between training and validation."""

    root: Path
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    hold_out_rule: str  # how the held-out part was chosen, for people
    digest: str  # 16 hexadecimal digits over names, contents and split
    hidden: int  # files and directories skipped since they are hidden
    binary: int  # files skipped since they hold a zero byte near their start

    @property
    def description(self) -> str:
        """One line for the start of a run: root, files, bytes, hash, what was held out, what was skipped."""
        files = len({document.name for document in self.train + self.held_out})
        held = sum(len(document.text) for document in self.held_out)
        total = held + sum(len(document.text) for document in self.train)
        skipped = [f"{count} {kind}" for kind, count in (("binary", self.binary), ("hidden", self.hidden)) if count]
        return (
            f"{self.root}: {files:,} files, {total:,} bytes, hash {self.digest}; held out: {self.hold_out_rule}, "
            f"{held:,} bytes" + (f"; skipped: {' and '.join(skipped)} files" if skipped else "")
        )


def read_corpus(data: DataSettings) -> Corpus:
    """Reads the files that `data` names.

    Raises:
        UserError: the path does not exist or cannot be read, or there is no text in it.
    """
    library = data.source == "stdlib" and data.path is None
    if data.path is None and not library:
        raise UserError("data.path is not given", "name a text file or a directory of them: data.path=…")
    root = Path(sysconfig.get_paths()["stdlib"] if data.path is None else data.path).expanduser()
    if not root.exists():
        raise UserError(f"data.path={root} does not exist", "name a text file or a directory of them")
    documents, binary = [], 0
    try:
        files, hidden = (_library_files(root), 0) if library else find_files(root)
        for name, path in files:
            text = path.read_bytes()
            if b"\0" in text[:8192]:
                binary += 1
            elif text:
                documents.append(Document(name, text))
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read: {error.strerror}", "mend its permissions, or move it"
        ) from None
    if not documents:
        raise UserError(
            f"data.path={root} holds no text (skipped: {binary} binary and {hidden} hidden files)",
            "name a text file, or a directory with at least one",
        )
    train, held_out, rule = _hold_out(documents, data.hold_out)
    return Corpus(root, train, held_out, rule, _digest(train, held_out), hidden, binary)


def find_files(root: Path, pruned: Set[str] = frozenset()) -> tuple[list[tuple[str, Path]], int]:
    """Names and paths of all files below a directory (or of the one file) in the order of their names.

    Left out are directories called as in `pruned`, links to nothing, and what is hidden; of the last the number of
    files and directories is returned too.
    """
    if not root.is_dir():
        return [(root.name, root)], 0
    found, hidden = [], 0
    for folder, folders, files in os.walk(root, onerror=_raise):
        shown = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        hidden += len(folders) - len(shown) + len(files) - len(paths)
        folders[:] = [name for name in shown if name not in pruned]
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(found), hidden


def _library_files(root: Path) -> list[tuple[str, Path]]:
    """The Python sources of the standard library, without LIBRARY_SKIPS."""
    found, _ = find_files(root, LIBRARY_SKIPS)
    return [(name, path) for name, path in found if name.endswith(".py") and LIBRARY_GENERATED not in name]


def _raise(error: OSError) -> None:
    raise error


def _hold_out(documents: Sequence[Document], share: float) -> tuple[tuple[Document, ...], tuple[Document, ...], str]:
    """Splits by a hash of the name; where that leaves one side empty (a single file), the end of the text is taken."""
    if share == 0:
        return tuple(documents), (), "nothing"
    chosen = [_fraction(document.name) < share for document in documents]
    if any(chosen) and not all(chosen):
        train = tuple(document for document, held in zip(documents, chosen, strict=True) if not held)
        held_out = tuple(document for document, held in zip(documents, chosen, strict=True) if held)
        return train, held_out, f"{len(held_out):,} files by a hash of their names"
    left = round(share * sum(len(document.text) for document in documents))
    train_end, held_end = list(documents), []
    while left > 0:
        last = train_end.pop()
        cut = max(0, len(last.text) - left)
        line = last.text.find(b"\n", cut) + 1  # the cut is moved to the next line, if one is left behind it
        cut = line if 0 < line < len(last.text) else cut
        left -= len(last.text)
        held_end.append(Document(last.name, last.text[cut:]))
        if cut:
            train_end.append(Document(last.name, last.text[:cut]))
            break
    return tuple(train_end), tuple(reversed(held_end)), f"the last {share:.1%} of the text"


def _fraction(name: str) -> float:
    """A number in [0, 1) that the name alone decides.

    BLAKE2s, since of the common hashes it holds out a representative twentieth of the standard library: near 5 % of the
    bytes too, and the n-grams' losses there are those of the library at large.
    """
    return int.from_bytes(hashlib.blake2s(name.encode("utf-8", "surrogateescape")).digest()[:7], "big") / 2**56


def _digest(*parts: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for document in part:
            for field in (document.name.encode("utf-8", "surrogateescape"), document.text):
                digest.update(len(field).to_bytes(8, "little") + field)
        digest.update(b"|")
    return digest.hexdigest()[:16]


def join(documents: Sequence[Document], tokenizer: Tokenizer) -> MemoryStore:
    """All documents as one stream, an end-of-text before each, so that its first token too is predicted."""
    kind = tokenizer.encode(b"").dtype
    end = np.full(1, tokenizer.end_of_text, kind)
    pieces = [piece for document in documents for piece in (end, tokenizer.encode(document.text))]
    starts = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)[::2]  # each behind its end-of-text
    return MemoryStore(np.concatenate(pieces) if pieces else end[:0], starts)
