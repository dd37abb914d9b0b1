"""FSDP2: every device holds a slice of each parameter, and gathers a block's parameters when it computes the block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rwkv_train.checkpoint.shards import WEIGHT, StateShard
from rwkv_train.config.mesh import Mesh
from rwkv_train.models import LanguageModel
from rwkv_train.training.strategy.shared import ShardedStrategy, adam_moments


class FSDP(ShardedStrategy, ModelParallelStrategy):
    """Sharded by rows over all devices, a block at a time.

    Matrices are gathered in the products' dtype; decay, bonus, mix and norm parameters, in groups of their own, in
    float32. Gradients are averaged in float32.
    """

    divided = sharded = True

    def __init__(self, backend: str, mesh: Mesh) -> None:
        super().__init__(mesh.data, mesh.context, process_group_backend=backend)

    def _materialise(self, model: LanguageModel) -> None:
        mesh = self.device_mesh["data_parallel"]
        products = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        matrices = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False)
        rest = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in cast("list[nn.Module]", model.blocks):
            if products is not None:
                fully_shard(_products(model, block), mesh=mesh, mp_policy=matrices)
            if hasattr(block, "ln0"):
                fully_shard(cast(nn.Module, block.ln0), mesh=mesh, mp_policy=rest)  # runs before the block does
            fully_shard(block, mesh=mesh, mp_policy=rest)
        if products is not None:
            fully_shard(model.head, mesh=mesh, mp_policy=matrices)
        fully_shard(model, mesh=mesh, mp_policy=rest)
        model.to_empty(device=self.root_device)

    def shards(self, moments: bool) -> Iterator[StateShard]:
        for module in self.lightning_module.modules():  # type: ignore[union-attr]
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass without a backward one leaves some gathered
        for name, parameter in self.named_weights():
            start = self._start(parameter.detach())
            yield StateShard(WEIGHT, name, start, _local(parameter.detach()), True)
            if moments and parameter.requires_grad:
                for moment, values in adam_moments(self.optimizers[0].state[parameter], parameter.detach()):
                    yield StateShard(moment, name, start, _local(values), True)

    def states(self) -> Iterator[dict[str, Any]]:
        yield from self.optimizers[0].state.values()

    def gathered(self, values: Tensor) -> Tensor:
        return values.full_tensor() if isinstance(values, DTensor) else values

    def _start(self, parameter: Tensor) -> int:
        """The flat number of this rank's first element: rows are shared out as torch.chunk does it."""
        rows = parameter.shape[0]
        first = min(-(-rows // self.world_size) * self.global_rank, rows)
        return first * (parameter.numel() // rows)


def _products(model: LanguageModel, block: nn.Module) -> list[nn.Module]:
    """The block's modules all of whose own parameters are matrices of products with every token."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = {module: [names[parameter] for parameter in module.parameters(recurse=False)] for module in block.modules()}
    return [module for module, held in own.items() if held and model.products.issuperset(held)]


def _local(values: Tensor) -> Tensor:
    assert isinstance(values, DTensor)
    return values.to_local().view(-1)
