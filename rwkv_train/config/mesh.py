"""How the ranks of a run are arranged: the one definition of "world size"."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run, in data-parallel groups of ranks that share their samples.

    Rank r has the data-parallel index r // context; the ranks of one group are neighbours.

    Attributes:
        data: number of groups that train on different samples, at least 1.
        context: ranks of a group, each with its own part of every sample's tokens, at least 1. Nothing splits samples
            yet: `build_strategy` refuses more than 1.

    Raises:
        ValueError: a size below 1.
    """

    data: int
    context: int = 1

    def __post_init__(self) -> None:
        if self.data < 1 or self.context < 1:
            raise ValueError(f"a mesh of {self.data} × {self.context} ranks: both sizes must be at least 1")

    @property
    def ranks(self) -> int:
        """The world size: all ranks."""
        return self.data * self.context

    def data_rank(self, rank: int) -> int:
        """The data-parallel index of a rank: ranks with the same one read the same samples."""
        return rank // self.context


ONE_RANK = Mesh(1)
