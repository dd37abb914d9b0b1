"""Sources of `prepare` that can be read once only, such as /dev/stdin: copied into a file first."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rwkv_train.data.tables import json_layout
from rwkv_train.errors import UserError

_COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # by their first bytes


@contextmanager
def copied(files: Sequence[tuple[str, Path]], out: Path, field: str) -> Iterator[list[tuple[str, Path]]]:
    """The files with each pipe or device replaced by a copy of what it gives, whose name says what that is.

    Args:
        files: (name, path) of each file.
        out: of the store; the copies lie beside it until the block ends.
        field: key of the text.

    Raises:
        UserError: a pipe cannot be read, or its copy cannot be written.
    """
    files = [(name, _of_every_process(path)) for name, path in files]
    if all(path.is_file() for _, path in files):
        yield files
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written: {error.strerror}", "give another --out") from None
    with folder as name:
        yield [
            (given, path if path.is_file() else _copy(path, Path(name) / f"{number}", field))
            for number, (given, path) in enumerate(files)
        ]


def _of_every_process(path: Path) -> Path:
    """The path; of an open file of this process, such as /dev/stdin, the file's own."""
    own = path.resolve() if path.is_file() and path.parts[:2] in (("/", "dev"), ("/", "proc")) else path
    return own if own.is_file() else path


def _copy(source: Path, target: Path, field: str) -> Path:
    try:
        with open(source, "rb") as pipe, open(target, "wb") as file:
            shutil.copyfileobj(pipe, file)
        with open(target, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}", "write it to a file, and give that") from None
    compression = next((suffix for begin, suffix in _COMPRESSED.items() if head.startswith(begin)), "")
    kinds = {"lines": ".jsonl", "array": ".json", "value": ".txt"}
    kind = ".parquet" if head == b"PAR1" else kinds[json_layout(target, compression[1:], field)]
    return target.rename(target.with_name(f"{target.name}-{source.name}{kind}{compression}"))
