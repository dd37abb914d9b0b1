"""What is known of each architecture without torch agrees with its code, and with the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkv_train.models import ARCHITECTURES, ModelConfig, build_model
from rwkv_train.models.registry import architecture, layer_charts, learning_rate_note

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_statistic_has_a_chart(name: str) -> None:
    assert set(ARCHITECTURES[name].charts) == set(architecture(name).statistics)


@pytest.mark.parametrize("key", list(layer_charts()))
def test_every_chart_is_documented(key: str) -> None:
    (row,) = (line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith(f"| `{key}`"))
    assert row.split("|")[4].strip() == layer_charts()[key].description


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_parts_of_a_state_have_names_and_a_size(name: str) -> None:
    config = ModelConfig(name, 2, 64, 50)
    model = build_model(config)
    _, state = model(torch.zeros(3, 5, dtype=torch.int64))
    assert len(architecture(name).state_parts) == len(state.layers[0])
    empty = model.empty_state(3)
    assert [part.shape for part in empty.tensors()] == [part.shape for part in state.tensors()]
    assert [part.dtype for part in empty.tensors()] == [part.dtype for part in state.tensors()]
    assert model.architecture.state_bytes(model.config) == empty.row_bytes()
    logits, _ = model(torch.ones(3, 5, dtype=torch.int64), empty)
    assert torch.equal(logits, model(torch.ones(3, 5, dtype=torch.int64))[0]), "an empty state is no state"


def test_a_learning_rate_by_the_rule_is_said() -> None:
    shape = ModelConfig("rwkv7", 32, 4096, 65536)
    assert learning_rate_note(shape, 0.45 / 4096, 0.04 / 4096) == (
        "lr      0.00011 → 9.77e-06 by the community's rule 0.45/C → 0.04/C; none was published"
    )
    assert learning_rate_note(shape, 1e-4, 1e-5) is None
    assert learning_rate_note(ModelConfig("rwkv4", 32, 4096, 65536), 0.45 / 4096, 0.04 / 4096) is None
