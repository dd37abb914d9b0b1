"""`prepare` of what can be read once only: pipes and standard input."""

from __future__ import annotations

import gzip
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_train.data.prepare import prepare
from tests.data.test_prepare import TEXTS, documents, options, write_jsonl

PIPED: dict[str, Callable[[str], bytes]] = {
    "lines": lambda lines: lines.encode(),
    "compressed lines": lambda lines: gzip.compress(lines.encode()),
    "array": lambda lines: f"[{','.join(lines.splitlines())}]".encode(),
}


@pytest.mark.parametrize("kind", PIPED)
def test_a_pipe_is_read_as_what_comes_out_of_it(tmp_path: Path, kind: str) -> None:
    content = PIPED[kind](write_jsonl(tmp_path / "a.jsonl").read_text())
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
    writer.start()
    prepare(options(tmp_path / "new" / "s", pipe))
    writer.join(20)
    assert documents(tmp_path / "new" / "s") == TEXTS
    assert sorted(file.suffix for file in (tmp_path / "new").iterdir()) == [".bin", ".crc", ".idx", ".json"]


def test_standard_input(tmp_path: Path) -> None:
    with open(write_jsonl(tmp_path / "a.jsonl"), "rb") as file:
        kept = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            prepare(options(tmp_path / "s", "-"))
        finally:
            os.dup2(kept, 0)
            os.close(kept)
    assert len(documents(tmp_path / "s")) == len(TEXTS)
