"""Strategies with the complete state on every device: a single device, and DDP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from rwkv_train.checkpoint.shards import WEIGHT, StateShard
from rwkv_train.models import LanguageModel
from rwkv_train.training.strategy.shared import ShardedStrategy, adam_moments


class _Replicated(ShardedStrategy):
    def shards(self, moments: bool) -> Iterator[StateShard]:
        owned = self.global_rank == 0
        for name, parameter in self.named_weights():
            yield StateShard(WEIGHT, name, 0, parameter.detach().view(-1), owned)
            if moments and parameter.requires_grad:
                for moment, values in adam_moments(self.optimizers[0].state[parameter], parameter.detach()):
                    yield StateShard(moment, name, 0, values.view(-1), owned)

    def states(self) -> Iterator[dict[str, Any]]:
        yield from self.optimizers[0].state.values()


class Single(_Replicated, SingleDeviceStrategy):  # type: ignore[override]
    """One device. The model has its values before training begins."""

    def _materialise(self, model: LanguageModel) -> None:
        """Nothing to do: the model has memory and values."""


class DDP(_Replicated, DDPStrategy):
    """A copy on each device, gradients averaged (gloo on CPUs, nccl on GPUs)."""

    def __init__(self, backend: str) -> None:
        # init_sync: every rank fills its copy in `setup`, rank 0's are not broadcast
        super().__init__(process_group_backend=backend, gradient_as_bucket_view=True, init_sync=False)

    def _materialise(self, model: LanguageModel) -> None:
        model.to_empty(device=self.root_device)

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, *args, **kwargs)
        optimizer.zero_grad()  # DDP makes other buckets in the second step; frees those of the first one
        return result
