"""What the generations share: embedding, extra LayerNorm, residual blocks, head, and the recurrent state.

A generation's module (rwkv4.py …) brings TimeMix and ChannelMix; their equations stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_train.models.recipe import RecipeRow


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Args:
        arch: the generation, one of `rwkv_train.models.ARCHITECTURES`.
        n_layer: number of blocks.
        n_embd: number of channels C.
        vocab_size: number of tokens V.
        dim_ffn: width of the channel mix; None: the generation's own (RWKV-4: 4 C).
    """

    arch: str
    n_layer: int
    n_embd: int
    vocab_size: int
    dim_ffn: int | None = None


class LayerState(NamedTuple):
    """What one block remembers of the past."""

    att_x: Tensor  # (B, C) last input of the time mix (after ln1), for its token shift
    ffn_x: Tensor  # (B, C) last input of the channel mix (after ln2)
    wkv: Tensor  # the operator's state, float32; (B, 3, C) in RWKV-4


class State(NamedTuple):
    """The memory of a whole model, of a size that does not depend on how many tokens were read."""

    att_x: Tensor  # (L, B, C)
    ffn_x: Tensor  # (L, B, C)
    wkv: Tensor  # (L, B, …)

    def layer(self, index: int) -> LayerState:
        return LayerState(self.att_x[index], self.ffn_x[index], self.wkv[index])

    @staticmethod
    def stack(layers: Sequence[LayerState]) -> State:
        att_x, ffn_x, wkv = zip(*layers, strict=True)
        return State(torch.stack(att_x), torch.stack(ffn_x), torch.stack(wkv))

    def rows(self, which: Sequence[int]) -> State:
        """The memories of these rows of the batch, in this order; a row may be wanted several times."""
        index = torch.tensor(list(which), dtype=torch.int64, device=self.wkv.device)
        return State(*(part.index_select(1, index) for part in self))

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """The rows of several states as one batch."""
        return State(*(torch.cat(parts, dim=1) for parts in zip(*states, strict=True)))


class Generation(Protocol):
    """What a generation's module offers to the backbone."""

    RECIPE: tuple[RecipeRow, ...]

    @staticmethod
    def TimeMix(config: ModelConfig, layer: int) -> nn.Module: ...

    @staticmethod
    def ChannelMix(config: ModelConfig, layer: int) -> nn.Module: ...


class Block(nn.Module):
    """x += time mix(ln1(x)); x += channel mix(ln2(x)). The first block also owns ln0, after the embedding."""

    def __init__(self, generation: Generation, config: ModelConfig, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = generation.TimeMix(config, layer)
        self.ffn = generation.ChannelMix(config, layer)

    def forward(self, x: Tensor, state: LayerState | None, starts: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """x (B, T, C) and the state before it → the same after it."""
        att_x, ffn_x, wkv = state if state is not None else (None, None, None)
        y, att_x, wkv = self.att(self.ln1(x), att_x, wkv, starts)
        x = x + y
        y, ffn_x = self.ffn(self.ln2(x), ffn_x, starts)
        return x + y, LayerState(att_x, ffn_x, wkv)


Readout = Callable[[Tensor, Tensor], Tensor]  # (hidden (B, T, C), head.weight (V, C)) → what is wanted of the logits


class Head(nn.Linear):
    """From channels to logits; a readout takes the logits' place where they are too many to exist at once."""

    def forward(self, x: Tensor, readout: Readout | None = None) -> Tensor:
        return super().forward(x) if readout is None else readout(x, self.weight)


class LanguageModel(nn.Module):
    """An RWKV language model; parameter names are those of the published checkpoints.

    `model(tokens, state=None)` takes tokens (B, T) int64 and returns logits (B, T, V) and the state after the last
    token. T > 1 runs in parallel over time, T = 1 step by step: same weights, same numbers. Gradients flow through the
    state.

    `model(tokens, starts=starts)` takes where documents begin, (B, T) bool: at each, state and token shift are those of
    a fresh text, so that documents in one row know nothing of each other.
    """

    def __init__(self, generation: Generation, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = 0  # every n-th block is recomputed in the backward pass; 0: none
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(generation, config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Head(config.n_embd, config.vocab_size, bias=False)
        # counted now: a strategy may cut the parameters later
        self._matmul_parameters = sum(
            p.numel() for name, p in self.named_parameters() if p.squeeze().dim() > 1 and name != "emb.weight"
        )

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        starts: Tensor | None = None,
        readout: Readout | None = None,
    ) -> tuple[Tensor, State]:
        """The logits and the state after the tokens; with a readout, what it returns instead of the logits."""
        x = cast(Block, self.blocks[0]).ln0(self.emb(tokens))  # (B, T, C)
        after: list[LayerState] = []
        for index, block in enumerate(self.blocks):
            before = None if state is None else state.layer(index)
            every = self.activation_checkpointing
            if every and index % every == 0 and torch.is_grad_enabled():
                x, layer_state = checkpoint(block, x, before, starts, use_reentrant=False, preserve_rng_state=False)
            else:
                x, layer_state = block(x, before, starts)
            after.append(layer_state)
        return self.head(self.ln_out(x), readout), State.stack(after)  # (B, T, V)

    def matmul_parameters(self) -> int:
        """Parameters that each token is multiplied with: all matrices but the embedding (for FLOPs: 6 a token)."""
        return self._matmul_parameters
