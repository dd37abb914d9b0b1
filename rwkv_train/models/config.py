"""The shape of a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


class Widths(Mapping[str, int]):
    """Widths by name, such as those of RWKV-7's low-rank matrices; immutable and hashable."""

    def __init__(self, values: Mapping[str, int] | None = None) -> None:
        self._items = tuple(sorted((values or {}).items()))

    def __getitem__(self, name: str) -> int:
        return dict(self._items)[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(dict(self._items))


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
    extra: Mapping[str, int] = field(default_factory=Widths)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", Widths(self.extra))
