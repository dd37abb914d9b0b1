"""The mesh of ranks: which of them read the same samples."""

from __future__ import annotations

import numpy as np
import pytest

from rwkv_train.config.mesh import Mesh
from rwkv_train.data.order import split_batch


def test_ranks_of_one_group_read_the_same_samples() -> None:
    """World size and number of data-parallel groups are two things: a step of 2 × 3 ranks has the samples of 2."""
    mesh = Mesh(data=2, context=3)
    assert mesh.ranks == 6
    assert [mesh.data_rank(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    split, plain = split_batch(16 * 8, 8, 4, mesh), split_batch(16 * 8, 8, 4, Mesh(2))
    assert (split.samples, split.micro, split.accumulation) == (16, 4, 2)
    for step, index, rank in np.ndindex(2, 2, 6):
        expected = plain.share(step, index, rank // 3)
        assert split.share(step, index, mesh.data_rank(rank)).tolist() == expected.tolist()


@pytest.mark.parametrize(("data", "context"), [(0, 1), (1, 0)])
def test_a_mesh_without_ranks(data: int, context: int) -> None:
    with pytest.raises(ValueError, match=f"a mesh of {data} × {context} ranks"):
        Mesh(data, context)
