"""The tables of docs/scaling.md: `python benchmarks/scaling.py [--quick]`, from the plan's formulas alone.

RWKV-4 14B on 64 A100-80G under every strategy, and larger models on H100-80G up to 1,024. Nothing is measured here;
plan_accuracy.py compares the same formulas with what is. Last line: one JSON object with the first table's figures.
"""

from __future__ import annotations

import argparse
import json

from measure import table

from rwkv_train.config.mesh import Mesh
from rwkv_train.models import ModelConfig
from rwkv_train.planning.cards import CARDS, Card
from rwkv_train.planning.memory import Layout, memory
from rwkv_train.planning.model import Counts, count
from rwkv_train.planning.speed import speed

SHAPE_14B = ModelConfig("rwkv4", 40, 5120, 50277)
LARGER_SHAPES = {"30B": (48, 7168), "65B": (64, 8960), "100B": (72, 10240)}  # layers, channels


def row(counts: Counts, layout: Layout, card: Card) -> dict[str, float]:
    needs, pace = memory(counts, layout), speed(counts, layout, card, "bf16-mixed")
    return {
        "device GB": needs.device / 1e9,
        "weights": needs.weights / 1e9,
        "gradients": needs.gradients / 1e9,
        "optimiser": needs.optimiser / 1e9,
        "activations": needs.activations / 1e9,
        "buffers": needs.buffers / 1e9,
        "host GB": needs.host / 1e9,
        "sent GB/step": pace.sent / 1e9,
        "tokens/s": pace.tokens_per_second,
        "MFU %": 100 * pace.mfu,
        "checkpoint GB": needs.checkpoint / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    parser.parse_args()
    counts, figures = count(SHAPE_14B, "bf16-mixed"), {}
    for strategy in ("ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3", "fsdp", "deepspeed_3_offload"):
        layout = Layout(strategy, Mesh(64), 2, 4096, 2, 1, True)
        figures[strategy] = row(counts, layout, CARDS["a100-80g"])
    head = list(figures["ddp"])
    print("14B, 64 × A100-80G, context 4096 × micro-batch 2 × 2 passes, blocks recomputed")
    print(table(["strategy", *head], [[name, *(f"{found[k]:,.1f}" for k in head)] for name, found in figures.items()]))
    lines = []
    for name, (layers, channels) in LARGER_SHAPES.items():
        counts = count(ModelConfig("rwkv4", layers, channels, 65536), "bf16-mixed")
        for devices, micro in ((256, 2), (1024, 1), (1024, 2)):
            found = row(counts, Layout("deepspeed_3", Mesh(devices), micro, 4096, 1, 1, True), CARDS["h100-80g"])
            lines.append(
                [name, f"{counts.parameters / 1e9:.1f}", str(devices), str(micro), *(f"{found[k]:,.1f}" for k in head)]
            )
    print("\nZeRO-3 on H100-80G, context 4096, blocks recomputed")
    print(table(["model", "parameters, 1e9", "devices", "micro", *head], lines))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
