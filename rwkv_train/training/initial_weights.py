"""The initial weights, shard by shard: no rank holds the complete model, and one rank computes each costly matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rwkv_train.checkpoint.shards import StateShard
from rwkv_train.models import ModelConfig, RecipeRow
from rwkv_train.models.recipe import Orthogonal, initial_value

Range = tuple[int, int]  # first element and end, of a flattened tensor


class Recipe:
    """The initial values of a recipe; bit-equal for every number of ranks.

    Args:
        rows: of all parameters, by name.
        shapes: of all parameters, by name.
        config: the model's shape.
        seed: of the values.
    """

    def __init__(
        self, rows: Mapping[str, RecipeRow], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, seed: int
    ) -> None:
        self.rows, self.config, self.seed = rows, config, seed
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}

    def fill(self, shards: Sequence[StateShard]) -> None:
        """Stores into each shard the values of its range; a collective call, each rank passes its own shards."""
        wanted: dict[str, list[StateShard]] = {name: [] for name in self.shapes}
        for shard in shards:
            wanted[shard.name].append(shard)
        shared = dist.is_initialized() and dist.get_world_size() > 1
        costly = [name for name in self.shapes if shared and isinstance(self.rows[name].init, Orthogonal)]
        for name in self.shapes.keys() - set(costly):
            if wanted[name]:
                _store(wanted[name], self._value(name).view(-1), 0)
        if shared:
            self._fill_shared(costly, wanted)

    def _fill_shared(self, costly: list[str], wanted: Mapping[str, list[StateShard]]) -> None:
        """Every rank computes some of the costly matrices, one at a time, and sends the other ranks their ranges."""
        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        needs: list[dict[str, Range]] = [{} for _ in range(ranks)]
        dist.all_gather_object(needs, {name: _span(wanted[name]) for name in costly}, group=group)
        for owners in rounds({name: Orthogonal.work(self.shapes[name]) for name in costly}, ranks):
            mine = owners[rank]
            value = None if mine is None else self._value(mine).view(-1)
            for owner, name in enumerate(owners):
                if name is not None:
                    _deliver(name, owner, value, [need[name] for need in needs], wanted[name], rank, group)

    def _value(self, name: str) -> Tensor:
        return initial_value(name, self.shapes[name], self.rows[name], self.config, self.seed)


def rounds(work: Mapping[str, int], ranks: int) -> list[list[str | None]]:
    """Assigns matrices to ranks: in each round every rank computes at most one, and all of a round cost about the same.

    The largest are assigned first, each to the rank that has the least work so far.
    """
    queues: list[list[str]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for name in sorted(work, key=lambda name: (-work[name], name)):
        rank = load.index(min(load))
        queues[rank].append(name)
        load[rank] += work[name]
    return [
        [queue[number] if number < len(queue) else None for queue in queues]
        for number in range(max(map(len, queues), default=0))
    ]


def _deliver(
    name: str,
    owner: int,
    value: Tensor | None,
    needs: Sequence[Range],
    shards: Sequence[StateShard],
    rank: int,
    group: object,
) -> None:
    """Sends the ranges of one matrix from its owner, which has its value, to the ranks that need them."""
    numel = max(stop for _, stop in needs)
    all_ranks = all(need == (0, numel) for need in needs)
    if rank == owner:
        assert value is not None
        if all_ranks:
            dist.broadcast(value, owner, group=group)  # type: ignore[arg-type]
        else:
            for other, (start, stop) in enumerate(needs):
                if other != owner and start < stop:
                    dist.send(value[start:stop], other, group=group)  # type: ignore[arg-type]
        _store(shards, value, 0)
        return
    start, stop = needs[rank]
    if start < stop:
        values = torch.empty(stop - start)
        if all_ranks:
            dist.broadcast(values, owner, group=group)  # type: ignore[arg-type]
        else:
            dist.recv(values, owner, group=group)  # type: ignore[arg-type]
        _store(shards, values, start)


def _span(shards: Sequence[StateShard]) -> Range:
    """The smallest range that contains all shards."""
    ranges = [(shard.start, shard.start + shard.values.numel()) for shard in shards if shard.values.numel()]
    return (min(start for start, _ in ranges), max(stop for _, stop in ranges)) if ranges else (0, 0)


def _store(shards: Sequence[StateShard], values: Tensor, start: int) -> None:
    """Stores the ranges of the shards; `values` begin at element `start` of the tensor."""
    for shard in shards:
        first = shard.start - start
        shard.store(values[first : first + shard.values.numel()])
