"""The shape of a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Args:
        arch: the architecture, a key of `rwkv_train.models.registry.ARCHITECTURES`.
        n_layer: number of blocks L.
        n_embd: number of channels C.
        vocab_size: number of tokens V.
        dim_ffn: width of the feed-forward part; None: the architecture's default (RWKV-4: 4 C).
        head_size: channels of one head; None: the architecture's default, or it has no heads.
        extra: further widths by name, such as those of low-rank matrices; absent ones are the architecture's default.
    """

    arch: str
    n_layer: int
    n_embd: int
    vocab_size: int
    dim_ffn: int | None = None
    head_size: int | None = None
    extra: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", dict(sorted(self.extra.items())))
