"""Uninitialised memory is full of NaN in these tests: an engine that leaves an element unwritten is seen."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """As many as torch takes by itself: the engines divide their work among them."""


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # makes torch.empty and its kin fill what they return with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
