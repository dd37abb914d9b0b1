"""Counts as users type them, and the nearest spelling of a setting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_train.config.schema import schema
from rwkv_train.config.suggestions import nearest
from rwkv_train.config.values import parse_count


@given(st.integers(0, 10**6), st.sampled_from([("", 0), ("k", 3), ("M", 6), ("B", 9), ("T", 12)]), st.integers(0, 6))
def test_counts(number: int, unit: tuple[str, int], shift: int) -> None:
    letter, power = unit
    assert parse_count(f"{number}{letter}") == number * 10**power
    assert parse_count(f"{number}e{shift}") == number * 10**shift
    if power >= shift:
        assert parse_count(f"{number // 10**shift}.{number % 10**shift:0{shift or 1}d}{letter}") == number * 10 ** (
            power - shift
        )


@given(st.floats(allow_nan=True, allow_infinity=True) | st.text(max_size=8))
def test_what_is_no_count_is_refused(value: float | str) -> None:
    try:
        count = parse_count(value)
    except ValueError:
        return
    assert isinstance(count, int)
    if isinstance(value, float):
        assert count == value


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "1.0005k", "1e-3", "nan", "inf", "1e999999999", "0x10", "1/2", "1K", "two"]
)
def test_no_counts(text: str) -> None:
    with pytest.raises(ValueError):
        parse_count(text)


def test_nearest() -> None:
    known = list(schema())
    pairs = {
        "model.n_layers": "model.n_layer",
        "lr": "optim.lr",
        "batch.contxt": "batch.context",
        "precision": "trainer.precision",
    }
    for typed, meant in pairs.items():
        assert nearest(typed, known) == meant
    assert nearest("zzzzqqq", known) is None
