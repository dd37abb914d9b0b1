"""Which Lightning strategy spreads a run over its devices."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, Strategy


def build_strategy(name: str, accelerator: str, processes: int) -> Strategy | str:
    """The strategy of a run: `auto` is one device by itself and DDP on several (over gloo on CPUs, nccl on GPUs)."""
    if name == "auto" and processes == 1:
        return "auto"
    backend = "gloo" if accelerator == "cpu" else "nccl"
    return DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)
