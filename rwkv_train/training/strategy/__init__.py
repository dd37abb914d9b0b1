"""How a run is distributed over its devices: Lightning strategies with our `ShardedStrategy` mixed in."""

from __future__ import annotations

from rwkv_train.config import Config
from rwkv_train.planning.resolved import ResolvedConfig
from rwkv_train.training.strategy.shared import ShardedStrategy

__all__ = ["ShardedStrategy", "build_strategy"]


def build_strategy(config: Config, resolved: ResolvedConfig, block: int) -> ShardedStrategy:
    """The strategy of a run; `attach` gives it the state that it is to hold.

    Args:
        config: of the run, for DeepSpeed's settings.
        resolved: what runs.
        block: number of parameters of one block.

    Raises:
        ValueError: a mesh with context ranks, which no strategy splits samples over.
    """
    name, mesh = resolved.strategy, resolved.mesh
    if mesh.context > 1:
        raise ValueError(f"strategy={name} cannot split samples over {mesh.context} context ranks")
    backend = "nccl" if resolved.gpu else "gloo"
    if name == "single":
        from rwkv_train.training.strategy.replicated import Single

        return Single("cuda:0" if resolved.gpu else "cpu")
    if name == "ddp":
        from rwkv_train.training.strategy.replicated import DDP

        return DDP(backend)
    if name == "fsdp":
        from rwkv_train.training.strategy.fsdp import FSDP

        return FSDP(backend, mesh)
    from rwkv_train.training.strategy.zero import Zero, deepspeed_config

    stage, offload = int(name.split("_")[1]), name.endswith("_offload")
    settings = deepspeed_config(config, resolved, stage, offload, block)
    return Zero(settings, backend, resolved.precision)
