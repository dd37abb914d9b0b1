"""Packing: every token once, no document cut that fits into a row, rows nearly full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data import packing
from rwkv_train.data.packing import pack


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 70), max_size=60), context=st.integers(1, 40))
def test_every_token_is_in_one_row(lengths: list[int], context: int) -> None:
    sizes = np.array(lengths, np.int64)
    packed = pack(np.cumsum(sizes) - sizes, sizes, context)
    seen = np.zeros(int(sizes.sum()), np.int64)
    for row in range(len(packed)):
        pieces = range(packed.rows[row], packed.rows[row + 1])
        assert 0 < sum(packed.lengths[piece] for piece in pieces) <= context
        for piece in pieces:
            seen[packed.begins[piece] : packed.begins[piece] + packed.lengths[piece]] += 1
    assert (seen == 1).all()
    whole = {start for start, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True) if 0 < size <= context}
    heads = {begin for begin, head in zip(packed.begins, packed.heads, strict=True) if head}
    assert whole <= heads
    assert packed.heads.sum() == (sizes > 0).sum(), "each document has one beginning"


@pytest.mark.parametrize("context", [1024, 4096])
def test_rows_are_full(context: int) -> None:
    """Lengths as in web text: log-normal, half under 545 tokens, a tail of many thousands."""
    draw = np.random.default_rng(0)
    sizes = np.clip(draw.lognormal(6.3, 1.2, 30_000), 8, 100_000).astype(np.int64)
    assert pack(np.cumsum(sizes) - sizes, sizes, context).fill >= 0.98


def test_blocks_are_packed_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "DOCUMENTS_PER_BLOCK", 10)
    sizes = np.full(95, 3, np.int64)
    packed = pack(3 * np.arange(95), sizes, 9)
    assert len(packed) == 9 * 4 + 2
    assert sorted(packed.begins.tolist()) == (3 * np.arange(95)).tolist()
