"""What a model remembers of the tokens it has read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LayerState = Any  # a NamedTuple of the architecture's own: tensors whose first dimension is the batch


class State(NamedTuple):
    """The memory of a model: a state of each layer, in the architecture's own form.

    Each is a NamedTuple of tensors whose first dimension is the batch; nothing here depends on what they are. While
    gradients are computed, the tensors may be views of activations.
    """

    layers: tuple[LayerState, ...]

    def rows(self, rows: Sequence[int]) -> State:
        """The states of these rows of the batch, in this order; a row may be given several times."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.layers[0][0].device)
        return State(tuple(type(layer)(*(part.index_select(0, index) for part in layer)) for layer in self.layers))

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """The rows of several states as one batch."""
        layers = zip(*(state.layers for state in states), strict=True)
        return State(tuple(type(same[0])(*map(torch.cat, zip(*same, strict=True))) for same in layers))

    @staticmethod
    def compact(layer: LayerState) -> LayerState:
        """A layer's state without tensors that are views of larger ones, which they would keep in memory."""
        if torch.compiler.is_compiling():  # the compiler decides what lives how long
            return layer
        return type(layer)(
            *(part if part.untyped_storage().nbytes() == part.nbytes else part.clone() for part in layer)
        )

    def row_bytes(self) -> int:
        """Bytes of one row of the batch."""
        return sum(part.nbytes // part.shape[0] for layer in self.layers for part in layer)

    @torch.no_grad()
    def finite(self, at_once: int) -> Tensor:
        """(P, L, B) bool: whether each of the P parts of each layer's state is finite, for each row.

        Args:
            at_once: bytes that are copied at a time; a few large operations are faster than many small ones.
        """
        found = []
        for parts in zip(*self.layers, strict=True):  # one part, of all layers
            size = max(1, at_once // max(parts[0].nbytes, 1))
            groups = (torch.stack(parts[first : first + size]) for first in range(0, len(parts), size))
            found.append(torch.cat([group.flatten(2).sum(-1).isfinite() for group in groups]))
        return torch.stack(found)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, layer by layer."""
        for layer in self.layers:
            yield from layer
