"""The goodput tables of docs/slurm.md: `python benchmarks/goodput.py [--quick]`, from the plan's formulas alone.

RWKV-4 14B under ZeRO-3 on 8 to 1,024 nodes of eight H100-80G: how often a node fails somewhere, the proposed interval
of checkpoints, and the share of the time that goes into steps which count, at the failure rates of four publications.
Nothing is measured here. Last line: one JSON object with the figures at the rate that `rwkv-train plan` takes.
"""

from __future__ import annotations

import argparse
import json

from measure import table

from rwkv_train.config.mesh import Mesh
from rwkv_train.models import ModelConfig
from rwkv_train.planning.cards import CARDS
from rwkv_train.planning.goodput import DEFAULT_CLUSTER, FAILURE_RATES, between_failures, goodput, interval, saving
from rwkv_train.planning.memory import Layout, memory
from rwkv_train.planning.model import count
from rwkv_train.planning.speed import speed

SHAPE_14B = ModelConfig("rwkv4", 40, 5120, 50277)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    parser.parse_args()
    card, counts = CARDS["h100-80g"], count(SHAPE_14B, "bf16-mixed")
    lines, figures = [], {}
    for nodes in (8, 16, 32, 64, 128, 256, 512, 1024):
        layout = Layout("deepspeed_3", Mesh(8 * nodes), 2, 4096, 1, 1, True)
        needs, pace = memory(counts, layout), speed(counts, layout, card, "bf16-mixed")
        cost = saving(needs, layout, card.per_machine, pace.seconds)
        cells = [f"{nodes:,}", f"{cost.pause:.1f}", f"{cost.write:.0f}"]
        for name, rate in FAILURE_RATES.items():
            failures = between_failures(nodes, rate)
            every = interval(cost, failures)
            share = goodput(every, cost, failures)
            cells.append(f"{failures / 3600:,.1f} h, {every / 60:.0f} min, {100 * share:.1f} %")
            if name == DEFAULT_CLUSTER:
                figures[str(nodes)] = {"hours": failures / 3600, "minutes": every / 60, "goodput": share}
        lines.append(cells)
    print("14B, ZeRO-3, nodes of 8 × H100-80G: time between failures, interval of checkpoints, goodput")
    print(table(["nodes", "pause, s", "write, s", *FAILURE_RATES], lines))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
