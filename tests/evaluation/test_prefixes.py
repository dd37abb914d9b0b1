"""Prefixes that texts share: what follows them is the same, and the states held at a time are bounded in bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rwkv_train.evaluation import prefixes
from rwkv_train.evaluation.prefixes import share_prefixes
from rwkv_train.inference.continuation import read
from tests.oracles.models import lively_model


@pytest.mark.parametrize("at_once", [2, 3, 100])
def test_states_are_bounded_in_bytes(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model().eval()
    draw = torch.Generator().manual_seed(1)
    shots = torch.randint(50, (60,), generator=draw).tolist()
    texts = [[*shots, *torch.randint(50, (5 + n,), generator=draw).tolist()] for n in range(8)]
    monkeypatch.setattr(prefixes, "MAX_STATE_BYTES", at_once * model.empty_state(1).row_bytes())
    groups: list[int] = []
    plain = prefixes._read_prefixes

    def note(*args: Any) -> Any:
        groups.append(len(args[3]))
        return plain(*args)

    monkeypatch.setattr(prefixes, "_read_prefixes", note)
    seen = []
    for batch in share_prefixes(model, texts, [len(text) - 1 for text in texts], 4):
        for text in batch:
            seen.append(text.number)
            rest = texts[text.number][text.read :]
            torch.testing.assert_close(
                read(model, [(rest, text.state)])[0], read(model, [(texts[text.number], None)])[0], rtol=1e-4, atol=1e-5
            )
    assert sorted(seen) == list(range(8))
    assert max(groups) == min(at_once, 8)
