"""How a run is spread over its devices: one file per family, behind Lightning's Strategy and our `ShardedStrategy`."""

from __future__ import annotations

from rwkv_train.config import Config
from rwkv_train.data.order import Split
from rwkv_train.training.strategy.shared import ShardedStrategy

__all__ = ["ShardedStrategy", "build_strategy"]


def build_strategy(
    config: Config, name: str, accelerator: str, devices: int, split: Split, block: int
) -> ShardedStrategy:
    """The strategy of a run.

    Args:
        config: of the run.
        name: settled: not "auto".
        accelerator: "cpu" (gloo) or "gpu" (nccl).
        devices: of one machine.
        split: of the global batch.
        block: parameters of one block.
    """
    backend = "gloo" if accelerator == "cpu" else "nccl"
    if name == "single":
        from rwkv_train.training.strategy.replicated import Single

        return Single("cpu" if accelerator == "cpu" else "cuda:0")
    if name == "ddp":
        from rwkv_train.training.strategy.replicated import DDP

        return DDP(backend)
    if name == "fsdp":
        from rwkv_train.training.strategy.fsdp import FSDP

        return FSDP(backend, config.trainer.machines, devices)
    from rwkv_train.training.strategy.zero import Zero, deepspeed_config

    stage, offload = int(name.split("_")[1]), name.endswith("_offload")
    settings = deepspeed_config(config, stage, offload, split.micro, accelerator == "gpu", block)
    return Zero(settings, backend, config.trainer.precision)
