"""Bits per byte: the loss per byte of the text that was predicted, which makes tokenizers comparable.

Training, validation and `rwkv-train eval` all count bytes by `token_bytes`, and divide by `bits_per_byte`.
"""

from __future__ import annotations

import math

import numpy as np

from rwkv_train.data.arrays import Ints
from rwkv_train.data.tokenizers import Tokenizer

END_OF_TEXT_BYTES = 1  # an end-of-text is predicted like a byte that separates two documents


def token_bytes(tokenizer: Tokenizer, vocabulary: int = 0) -> Ints:
    """Bytes that each token counts as when it is predicted.

    Args:
        tokenizer: that made the tokens.
        vocabulary: tokens that the model knows; those beyond the tokenizer's count as 0 bytes.

    Returns:
        int64 (V,), where V is the larger one of the two vocabularies.
    """
    counts = tokenizer.byte_counts()
    counts = np.concatenate((counts, np.zeros(max(0, vocabulary - len(counts)), np.int64)))
    counts[tokenizer.end_of_text] = END_OF_TEXT_BYTES
    return counts


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Bits per byte of a text.

    Args:
        nats: sum of the losses of its predicted tokens.
        text_bytes: sum of the `token_bytes` of the same tokens; 0 is taken as 1.
    """
    return nats / math.log(2) / max(1, text_bytes)
