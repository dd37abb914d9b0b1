"""What one model costs, counted on a model whose tensors have shapes but no values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from rwkv_train.config import Config
from rwkv_train.errors import UserError
from rwkv_train.models import LanguageModel, ModelConfig, build_model
from rwkv_train.models.registry import architecture


@dataclass(frozen=True)
class Counts:
    """Of a model and a micro-batch of it.

    Args:
        parameters: number of parameters of the model.
        trainable: those of them that are trained; only these have gradients and moments.
        matmul: parameters that each token is multiplied with.
        block, block_matmul: the same of one block.
        largest: parameters of the largest single tensor.
        shape: the model's, complete.
        state_bytes: of the state of one sequence.
        block_saved: bytes that one block keeps of a token for its backward pass.
        block_casts: bytes of weights in the products' dtype that autocast keeps for one block.
        block_extra: bytes that a block's backward pass needs at its height besides, of a token.
        stream: bytes of a token between two blocks.
        ends_saved: bytes kept of a token by embedding, ln0 and ln_out.
        logit: bytes of one logit as the head gives it.
    """

    parameters: int
    trainable: int
    matmul: int
    block: int
    block_matmul: int
    largest: int
    shape: ModelConfig
    state_bytes: int
    block_saved: float
    block_casts: int
    block_extra: float
    stream: int
    ends_saved: float
    logit: int

    def flops_per_token(self, context: int) -> int:
        """FLOPs of the forward and backward pass for one token of a context of that length."""
        return architecture(self.shape.arch).flops_per_token(self.shape, self.matmul, context)


def model_config(config: Config, vocab_size: int) -> ModelConfig:
    """The complete shape of the model that a config asks for.

    Args:
        config: the settings.
        vocab_size: that of the tokenizer; model.vocab_size comes first.

    Raises:
        UserError: the architecture has no model of that shape.
    """
    asked = config.model
    shape = ModelConfig(
        config.arch,
        asked.n_layer,
        asked.n_embd,
        asked.vocab_size or vocab_size,
        asked.dim_ffn,
        asked.head_size,
        asked.extra,
    )
    try:
        return architecture(config.arch).complete(shape)
    except ValueError as error:
        raise UserError(f"arch={config.arch}: {error}", "change that setting of model") from None


@lru_cache(maxsize=8)
def parameters(shape: ModelConfig) -> int:
    """Number of parameters of a model."""
    return sum(p.numel() for p in build_model(shape, device="meta").parameters())


@lru_cache(maxsize=8)
def count(shape: ModelConfig, precision: str) -> Counts:
    """Counts a model.

    Args:
        shape: of the model.
        precision: 32-true or bf16-mixed.
    """
    model = build_model(shape, device="meta")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    in_block = {name: size for name, size in sizes.items() if name.startswith("blocks.1.")} or {
        name: size for name, size in sizes.items() if name.startswith("blocks.0.") and ".ln0." not in name
    }
    shape, matrices = model.config, model.products
    small, one = (replace(shape, n_layer=layers, vocab_size=min(shape.vocab_size, 256)) for layers in (2, 1))
    short, long = 64, 128
    two_short, one_short = _saved(small, precision, short), _saved(one, precision, short)
    two_long, one_long = _saved(small, precision, long), _saved(one, precision, long)
    block_saved = ((two_long - one_long) - (two_short - one_short)) / (long - short)
    mixed = precision == "bf16-mixed"
    widest = max(max(p.shape) for name, p in model.named_parameters() if name in matrices and name in in_block)
    return Counts(
        parameters=sum(sizes.values()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        matmul=model.matmul_parameters,
        block=sum(in_block.values()),
        block_matmul=sum(size for name, size in in_block.items() if name in matrices),
        largest=max(sizes.values()),
        shape=shape,
        state_bytes=model.architecture.state_bytes(shape),
        block_saved=block_saved,
        block_casts=round((two_short - one_short) - block_saved * short),
        block_extra=2 * widest * (2 if mixed else 4),
        stream=4 * shape.n_embd,
        ends_saved=(one_long - one_short) / (long - short) - block_saved,
        logit=2 if mixed else 4,
    )


def _saved(shape: ModelConfig, precision: str, length: int) -> int:
    """Bytes that autograd keeps of a sample for the backward pass, without head, parameters left out."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import: only where there is a plan

    model: LanguageModel = build_model(shape, device="meta")
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
        known = {p.untyped_storage()._cdata for p in model.parameters()}
        found: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                found[storage._cdata] = storage  # kept alive, so that its address is not used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(1, length, dtype=torch.int64), readout=lambda hidden, weight: hidden)
        return sum(storage.nbytes() for storage in found.values())
