"""What the architectures share: embedding, residual blocks, final norm and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_train import ops
from rwkv_train.models.architecture import Architecture, Context
from rwkv_train.models.config import ModelConfig
from rwkv_train.models.recipe import claim
from rwkv_train.models.registry import architecture
from rwkv_train.models.state import LayerState, State


class ResidualBlock(nn.Module):
    """The parts of x += att(ln1(x)); x += ffn(ln2(x)). The first block also owns ln0, after the embedding."""

    def __init__(self, config: ModelConfig, layer: int, att: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = att
        self.ffn = ffn


class HeadNorm(nn.Module):
    """The norm of each head, with the gate of RWKV-5, 6 and 7; see `ops.head_norm`."""

    def __init__(self, channels: int, head_size: int, eps: float) -> None:
        super().__init__()
        self.head_size, self.eps = head_size, eps
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, y: Tensor, gate: Tensor, current: tuple[Tensor, Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """y (B, T, C), gate (B, T, C) and RWKV-7's r, k, v, r_k → (B, T, C)."""
        return ops.head_norm(y, gate, self.weight, self.bias, self.head_size, self.eps, current)


Readout = Callable[[Tensor, Tensor], Tensor]  # (hidden (B, T, C), head.weight (V, C)) → what is wanted of the logits


class Head(nn.Linear):
    """From channels to logits; a readout replaces the logits where they are too many to exist at once."""

    def forward(self, x: Tensor, readout: Readout | None = None) -> Tensor:
        return super().forward(x) if readout is None else readout(x, self.weight)


class LanguageModel(nn.Module):
    """A language model; parameter names are those of the published checkpoints.

    `model(tokens, state=None)` takes tokens (B, T) int64 and returns logits (B, T, V) and the state after the last
    token. T > 1 runs in parallel over time, T = 1 step by step: same weights, same numbers. Gradients flow through the
    state.

    `model(tokens, starts=starts)` takes where documents begin, (B, T) bool: at each, the model has read nothing, so
    that documents in one row know nothing of each other.

    Args:
        config: the shape, complete (see `Architecture.complete`).

    Attributes:
        products: names of the parameters that take part in matrix products with every token.
        matmul_parameters: number of these parameters' elements.
        activation_checkpointing: every n-th block is recomputed in the backward pass; 0: none.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        brought = self.architecture
        self.activation_checkpointing = 0
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(brought.block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Head(config.n_embd, config.vocab_size, bias=False)
        rows = claim((name for name, _ in self.named_parameters()), brought.recipe)
        self.products = frozenset(name for name, row in rows.items() if row.product and row.trains(name))
        # counted now: a strategy may cut the parameters later
        self.matmul_parameters = sum(p.numel() for name, p in self.named_parameters() if name in self.products)

    def checkpoint_activations(self, every: int) -> None:
        """Recomputes every n-th block in the backward pass; 0: none."""
        self.activation_checkpointing = every

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        starts: Tensor | None = None,
        readout: Readout | None = None,
    ) -> tuple[Tensor, State]:
        """The logits and the state after the tokens; with a readout, what it returns instead of the logits."""
        x = self.emb(tokens)  # (B, T, C)
        if hasattr(self.blocks[0], "ln0"):
            x = cast(nn.Module, self.blocks[0].ln0)(x)
        shared: dict[str, Tensor] = {}
        after: list[LayerState] = []
        for index, block in enumerate(self.blocks):
            before = None if state is None else state.layers[index]
            every, context = self.activation_checkpointing, Context(starts, shared)
            if not torch.is_grad_enabled():
                x, layer_state, shared = block(x, before, context)
                after.append(State.compact(layer_state))
            elif every and index % every == 0:
                x, layer_state, shared = checkpoint(
                    block, x, before, context, use_reentrant=False, preserve_rng_state=False
                )
                after.append(State.compact(layer_state))
            else:  # the backward pass needs the activations anyway
                x, layer_state, shared = block(x, before, context)
                after.append(layer_state)
        return self.head(self.ln_out(x), readout), State(tuple(after))  # (B, T, V)

    @property
    def architecture(self) -> Architecture:
        return architecture(self.config.arch)

    def flops_per_token(self, context: int) -> int:
        """FLOPs of the forward and backward pass for one token of a context of that length."""
        return self.architecture.flops_per_token(self.config, self.matmul_parameters, context)

    def empty_state(self, batch: int) -> State:
        """The state of `batch` texts of which nothing has been read, on the model's device."""
        like = self.emb.weight
        return self.architecture.blank(self.config, batch, like.device, like.dtype)
