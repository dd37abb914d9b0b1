"""Processes that tokenise: each has the tokenizer loaded, and ends with the process that began it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from rwkv_train.data.tokenizers import Tokenizer, load_tokenizer

_tokenizer: Tokenizer  # of this process


def pool(workers: int, name: str, extend: Sequence[str]) -> ProcessPoolExecutor:
    """That many processes with a tokenizer, which `tokenizer` gives to what runs there."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["rwkv_train.data.prepare.shards"])  # imported once, not once for each process
    return ProcessPoolExecutor(workers, context, _begin, (name, tuple(extend)))


def set_up(name: str, extend: Sequence[str]) -> None:
    """Lets `tokenizer` give that one in this process too."""
    global _tokenizer
    _tokenizer = load_tokenizer(name, extend)


def tokenizer() -> Tokenizer:
    return _tokenizer


def _begin(name: str, extend: Sequence[str]) -> None:
    os.nice(1)  # a machine that prepares can still be worked on
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    set_up(name, extend)


def _end_with(parent: int) -> None:
    """A killed parent's children would wait for work forever: its fork server ends with it, and that is seen."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
