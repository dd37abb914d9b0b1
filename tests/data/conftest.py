"""Shared by the tests of prepare."""

from __future__ import annotations

import pytest

from rwkv_train.data.prepare import units


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 3,000 bytes, so that there are many."""
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
