"""Models with weights far from their initial zeros, and their names in transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_train.models import ARCHITECTURES, LanguageModel, ModelConfig, build_model


def small_shape(arch: str, n_layer: int = 3, n_embd: int = 32, vocab_size: int = 50) -> ModelConfig:
    """The shape of a small model, with several heads where the architecture has heads."""
    head_size = 8 if "head_size" in ARCHITECTURES[arch].settings else None
    return ModelConfig(arch, n_layer, n_embd, vocab_size, head_size=head_size)


def lively_model(
    n_layer: int = 3,
    n_embd: int = 32,
    vocab_size: int = 50,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    arch: str = "rwkv4",
) -> LanguageModel:
    """`lively` of a `small_shape`."""
    return lively(small_shape(arch, n_layer, n_embd, vocab_size), seed, dtype)


def lively(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model with every parameter moved off its initial value, so that no term is multiplied by zero."""
    model = build_model(config, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = (
                0.5 if name == "emb.weight" else 0.1 if parameter.squeeze().dim() < 2 else parameter.shape[1] ** -0.5
            )
            parameter.add_((scale * noise).to(dtype))
    return model


def in_transformers(name: str) -> str:
    """A parameter's name in transformers' RwkvForCausalLM."""
    if name == "head.weight":
        return name
    for ours, theirs in (
        ("emb.", "embeddings."),
        (".ln0.", ".pre_ln."),
        (".att.", ".attention."),
        (".ffn.", ".feed_forward."),
        ("time_mix_k", "time_mix_key"),
        ("time_mix_v", "time_mix_value"),
        ("time_mix_r", "time_mix_receptance"),
    ):
        name = name.replace(ours, theirs)
    return f"rwkv.{name}"


def transformers_twin(model: LanguageModel) -> torch.nn.Module:
    """transformers' model with the same weights, in the same dtype, in training mode (no rescaling of layers)."""
    from transformers import RwkvConfig, RwkvForCausalLM

    shape = model.config
    config = RwkvConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.n_embd,
        num_hidden_layers=shape.n_layer,
        context_length=1024,
        rescale_every=0,
        use_cache=False,
        tie_word_embeddings=False,
    )
    twin: torch.nn.Module = RwkvForCausalLM(config)
    twin.to(model.emb.weight.dtype)
    weights: dict[str, Tensor] = {in_transformers(name): value for name, value in model.state_dict().items()}
    twin.load_state_dict(weights)
    return twin.train()
