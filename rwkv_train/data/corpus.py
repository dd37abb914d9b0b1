"""Text files to train on: which files, in which order, and which of them are held out.

All of it depends on the files alone: they are read in the order of their names, and a hash of a file's name decides
whether it is held out, so that adding a file moves no other one between training and validation.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_train.config import DataSettings
from rwkv_train.data.formats import format_of
from rwkv_train.data.indexed import PARTS_SUFFIX, PLAN_FILE, STORE_SUFFIXES, is_index
from rwkv_train.data.learned import LearnedTokenizer
from rwkv_train.data.store import MemoryStore
from rwkv_train.data.tokenizers import Tokenizer
from rwkv_train.errors import UserError
from rwkv_train.user_path import user_path

# Directories of the standard library whose files have near-copies elsewhere in it (character tables, tests, the
# generated build description): a model would have memorised them if they were held out.
SKIPPED_LIBRARY_DIRECTORIES = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "lib2to3",
    "idlelib",
}
GENERATED_LIBRARY_FILE = "_sysconfigdata_"


@dataclass(frozen=True)
class Document:
    """A text file, or a part of one.

    Attributes:
        name: path relative to the corpus root, with / as the separator.
        text: content of the file, not necessarily UTF-8.
    """

    name: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents, split into training and validation.

    Attributes:
        root: the directory or file that was read.
        train: training documents in the order of their names.
        held_out: validation documents in the order of their names.
        hold_out_rule: how the held-out part was chosen, for the description.
        digest: hash over names, contents and split, 16 hexadecimal digits.
        hidden: number of files and directories skipped because they are hidden.
        binary: number of files skipped because of a zero byte among their first 8 KiB.
    """

    root: Path
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    hold_out_rule: str
    digest: str
    hidden: int
    binary: int

    @property
    def description(self) -> str:
        """One line for the log at the start of a run: root, files, bytes, hash, held-out part, skipped files."""
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
        UserError: the path does not exist, cannot be read, or contains no text.
    """
    library = data.source == "stdlib" and data.path is None
    if data.path is None and not library:
        raise UserError("data.path is not set", "give a text file or a directory of text files: data.path=…")
    root = user_path(sysconfig.get_paths()["stdlib"] if data.path is None else data.path)
    if not root.exists():
        raise UserError(f"data.path={root} does not exist", "give a text file or a directory of text files")
    _refuse_rows(root)
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
            f"{error.filename} cannot be read: {error.strerror}", "fix its permissions, or move it out of data.path"
        ) from None
    if not documents:
        raise UserError(
            f"data.path={root} contains no text (skipped: {binary} binary and {hidden} hidden files)",
            "give a text file, or a directory that contains one",
        )
    train, held_out, rule = _hold_out(documents, data.hold_out)
    return Corpus(root, train, held_out, rule, _digest(train, held_out), hidden, binary)


def _refuse_rows(path: Path) -> None:
    """Refuses a file of rows or a compressed one, which would be read as the text that it is not.

    Raises:
        UserError: it is one.
    """
    kind, compression = format_of(path)
    if path.is_file() and (kind in ("jsonl", "parquet") or compression):
        raise UserError(
            f"data.path={path} is no plain text: its name says {compression or kind}",
            f"make a store of its rows with `rwkv-train prepare {path} --tokenizer world --out STORE`, or read "
            "conversations with data=chat",
        )


def find_files(root: Path, pruned: Set[str] = frozenset(), follow: bool = True) -> tuple[list[tuple[str, Path]], int]:
    """Finds all files below a directory, in the order of their names.

    Hidden files, broken links, directories named in `pruned`, token stores and the folders of an unfinished `prepare`
    are left out. Linked directories are searched after all others; none is searched twice, so that a link to a
    directory above does no harm.

    Args:
        root: a directory, or a single file.
        pruned: names of directories that are not searched.
        follow: whether linked directories are searched.

    Returns:
        (name relative to root, path) of each file, and the number of hidden files and directories.

    Raises:
        OSError: a directory cannot be read.
    """
    if not root.is_dir():
        return [(root.name, root)], 0
    found, hidden, searched = [], 0, set()
    pending = deque([root])
    while pending:
        for folder, folders, files in os.walk(pending.popleft(), onerror=_raise):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in searched:
                folders.clear()
                continue
            searched.add((status.st_dev, status.st_ino))
            shown = [name for name in folders if not name.startswith(".")]
            paths = [Path(folder, name) for name in files if not name.startswith(".")]
            hidden += len(folders) - len(shown) + len(files) - len(paths)
            inside = without_stores([Path(folder, name) for name in sorted(shown) if name not in pruned])
            folders[:] = [path.name for path in inside if not path.is_symlink()]
            pending += [path for path in inside if path.is_symlink()] if follow else []
            found += [(path.relative_to(root).as_posix(), path) for path in without_stores(paths) if path.is_file()]
    return sorted(found), hidden


def without_stores(paths: Sequence[Path]) -> list[Path]:
    """Leaves out the files of token stores, and the folders of an unfinished `prepare`.

    Args:
        paths: files and directories, with all files of their directories.
    """
    stores = {path.with_suffix("") for path in paths if path.suffix == ".idx" and path.is_file() and is_index(path)}
    return [
        path
        for path in paths
        if not (path.suffix in STORE_SUFFIXES and path.with_suffix("") in stores)
        and not (path.suffix == PARTS_SUFFIX and (path / PLAN_FILE).exists())
    ]


def _library_files(root: Path) -> list[tuple[str, Path]]:
    """The Python sources of the standard library, without SKIPPED_LIBRARY_DIRECTORIES."""
    found, _ = find_files(root, SKIPPED_LIBRARY_DIRECTORIES, follow=False)
    return [(name, path) for name, path in found if name.endswith(".py") and GENERATED_LIBRARY_FILE not in name]


def _raise(error: OSError) -> None:
    raise error


def _hold_out(documents: Sequence[Document], share: float) -> tuple[tuple[Document, ...], tuple[Document, ...], str]:
    """Splits by a hash of the name; holds out the end of the text if that leaves one side empty (a single file), or
    takes most of the text where a small share is asked for (a large file among few).

    Returns:
        Training documents, held-out documents, and the rule that chose them.
    """
    if share == 0:
        return tuple(documents), (), "nothing"
    chosen = [_fraction(document.name) < share for document in documents]
    size = sum(len(document.text) for document in documents)
    held_size = sum(len(document.text) for document, held in zip(documents, chosen, strict=True) if held)
    if any(chosen) and not all(chosen) and (held_size <= size / 2 or share >= 0.5):
        train = tuple(document for document, held in zip(documents, chosen, strict=True) if not held)
        held_out = tuple(document for document, held in zip(documents, chosen, strict=True) if held)
        return train, held_out, f"{len(held_out):,} files by a hash of their names"
    left = round(share * size)
    train_end, held_end = list(documents), []
    while left > 0:
        last = train_end.pop()
        cut = max(0, len(last.text) - left)
        line = last.text.find(b"\n", cut) + 1  # move the cut to the next line, if there is one after it
        cut = line if 0 < line < len(last.text) else cut
        left -= len(last.text)
        held_end.append(Document(last.name, last.text[cut:]))
        if cut:
            train_end.append(Document(last.name, last.text[:cut]))
            break
    return tuple(train_end), tuple(reversed(held_end)), f"the last {share:.1%} of the text"


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone.

    Of the common hashes, BLAKE2s holds out a representative twentieth of the standard library: about 5 % of the bytes
    too, with the n-gram losses of the complete library.
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
    """Tokenises documents into one stream, with an end-of-text before each so that its first token is predicted too."""
    kind = tokenizer.encode(b"").dtype
    end = np.full(1, tokenizer.end_of_text, kind)
    texts = [document.text for document in documents]
    encoded = tokenizer.encode_all(texts) if isinstance(tokenizer, LearnedTokenizer) else map(tokenizer.encode, texts)
    pieces = [piece for tokens in encoded for piece in (end, tokens)]
    starts = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)[::2]  # after each document's end-of-text
    return MemoryStore(np.concatenate(pieces) if pieces else end[:0], starts)
