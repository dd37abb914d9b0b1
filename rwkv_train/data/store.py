"""Where tokens lie, and how a batch of windows is read from there."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from rwkv_train.data.tokenizers import Tokens


class Store(Protocol):
    """A stream of tokens of known length."""

    def __len__(self) -> int:
        """The number of tokens."""

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """`length` tokens from each of `starts` (N,): (N, length)."""


class MemoryStore:
    """Tokens in memory, in the smallest type that holds them.

    Args:
        tokens: (N,), any integer type.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        places: npt.NDArray[np.int64] = starts[:, None] + np.arange(length)
        return np.asarray(self.tokens[places], dtype=np.int64)
