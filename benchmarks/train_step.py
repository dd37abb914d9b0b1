"""A training step of RWKV-4 L6 C512 V256 on the CPU against the machine's matmul rate and against transformers' models.

    python benchmarks/train_step.py [--quick]

A step is forward, loss, backward, gradient clipping and Adam, float32, all cores. The peers are transformers' Rwkv of
the same shape and a Llama of equal parameter count, in their fastest setting (sdpa, no cache), with the same loss,
clipping, fused Adam, threads and allocator; all take turns in one process, and medians count. matmul_fraction is
6 · matmul parameters · tokens/s over the highest matmul rate among 2048³, 4096³ and the step's own shapes. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, RwkvConfig, RwkvForCausalLM

from rwkv_train.models import LanguageModel, ModelConfig, build_model
from rwkv_train.training.loss import language_model_loss
from rwkv_train.training.throughput import keep_freed_memory

LAYERS, CHANNELS, VOCABULARY = 6, 512, 256
CASES = {"B4_T128": (4, 128), "B4_T512": (4, 512), "B1_T2048": (1, 2048)}


def rwkv_peer() -> nn.Module:
    config = RwkvConfig(
        vocab_size=VOCABULARY,
        context_length=2048,
        hidden_size=CHANNELS,
        num_hidden_layers=LAYERS,
        intermediate_size=4 * CHANNELS,
        use_cache=False,
    )
    return RwkvForCausalLM(config)


def llama_peer() -> nn.Module:
    """Attention 4 C² and a gated feed-forward part 3 · C · 3C: 13 C² a layer, as in RWKV-4."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=CHANNELS,
        num_hidden_layers=LAYERS,
        intermediate_size=3 * CHANNELS,
        num_attention_heads=CHANNELS // 64,
        max_position_embeddings=2048,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


class Trainee:
    """A model with its optimiser; `step` is what is measured."""

    def __init__(self, model: nn.Module, logits: Callable[[Tensor], Tensor]) -> None:
        self.model, self.logits = model.train(), logits
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)

    def step(self, tokens: Tensor) -> None:
        loss = language_model_loss(self.logits(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def matmul_shapes(tokens: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of the step's matrix products: forward and gradient of the input, and gradients of the weights."""
    widths = [(CHANNELS, CHANNELS), (CHANNELS, 4 * CHANNELS), (4 * CHANNELS, CHANNELS)]
    return [(tokens, k, n) for k, n in widths] + [(m, tokens, n) for m, n in widths]


def compare(B: int, T: int, trainees: dict[str, Trainee], rounds: int, slow_rounds: int) -> dict[str, Any]:
    tokens = torch.randint(VOCABULARY, (B, T + 1), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in trainees}
    rates: dict[tuple[int, int, int], float] = {}
    for index in range(-1, rounds):  # round -1 warms up
        shapes = [(2048, 2048, 2048), *matmul_shapes(B * T)] + ([(4096, 4096, 4096)] if index % 3 == 0 else [])
        for shape in shapes:
            rates[shape] = max(rates.get(shape, 0.0), measure.matmul_flops_per_second(*shape, repeats=2))
        for name, trainee in trainees.items():
            if name == "hf_rwkv" and index not in range(slow_rounds):
                continue
            took = measure.seconds(lambda trainee=trainee: trainee.step(tokens))  # type: ignore[misc]
            if index >= 0:
                times[name].append(took)
    best = max(rates, key=lambda shape: rates[shape])
    speed = {name: B * T / measure.median(values) for name, values in times.items()}
    return {"speed": speed, "rate": rates[best], "rate_shape": "×".join(map(str, best)), "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under 150 seconds")
    quick = parser.parse_args().quick
    keep_freed_memory()
    torch.manual_seed(0)
    ours = build_model(ModelConfig("rwkv4", n_layer=LAYERS, n_embd=CHANNELS, vocab_size=VOCABULARY))
    peers = {"hf_rwkv": rwkv_peer(), "hf_llama": llama_peer()}
    trainees = {"ours": Trainee(ours, lambda tokens: ours(tokens)[0])}
    for name, peer in peers.items():
        trainees[name] = Trainee(peer, lambda tokens, peer=peer: peer(input_ids=tokens, use_cache=False).logits)  # type: ignore[misc]
    count = {name: sum(p.numel() for p in trainee.model.parameters()) for name, trainee in trainees.items()}
    assert max(count.values()) < 1.01 * min(count.values()), count
    for trainee in trainees.values():
        trainee.step(torch.zeros(1, 17, dtype=torch.int64))  # builds the engine, makes the optimiser's state

    result, rows = {}, []
    for name, (B, T) in CASES.items():
        rounds, slow_rounds = (6 if T == 128 else 4, 1) if quick else (25 if T == 128 else 15, 3)
        found = compare(B, T, trainees, rounds, slow_rounds)
        speed = found["speed"]
        assert isinstance(ours, LanguageModel)
        result[name] = {
            "matmul_fraction": round(ours.flops_per_token(T) * speed["ours"] / found["rate"], 3),
            "vs_hf_rwkv": round(speed["ours"] / speed["hf_rwkv"], 3),
            "vs_hf_llama": round(speed["ours"] / speed["hf_llama"], 3),
            "tokens_per_s": round(speed["ours"]),
        }
        llama_fraction = ours.flops_per_token(T) * speed["hf_llama"] / found["rate"]
        rows.append(
            [
                name.replace("_", " "),
                f"{speed['ours']:.0f} tok/s",
                f"{result[name]['matmul_fraction']:.3f}",
                f"{found['rate'] / measure.GIGA:.0f} at {found['rate_shape']}",
                f"{speed['hf_rwkv']:.0f} ({result[name]['vs_hf_rwkv']:.2f} ×)",
                f"{speed['hf_llama']:.0f} ({result[name]['vs_hf_llama']:.2f} ×)",
                f"{llama_fraction:.3f}",
                f"{min(found['times']['ours']) * 1e3:.0f} / {measure.median(found['times']['ours']) * 1e3:.0f} ms",
            ]
        )
    header = ["case", "ours", "of matmul rate", "GFLOP/s", "HF Rwkv", "HF Llama", "Llama's share", "ours best/median"]
    print(measure.table(header, rows))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
