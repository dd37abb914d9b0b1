"""Expected goodput of docs/slurm.md: `python benchmarks/goodput.py [--quick]`, from published failure rates.

Nothing is measured here: Daly's formula, with what checkpoints take as rwkv_train/planning/interval.py assumes it. How
long one really stops a run, checkpoint_pause.py measures and `rwkv-train status` tells. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json

from measure import table

from rwkv_train.planning.interval import RATES, between_failures, cost, goodput, interval

MACHINES = (8, 16, 32, 64, 128, 256, 512, 1024)
GPUS = 8  # of a machine
STATE = 14e9 * 12  # bytes of a checkpoint: weights and two moments of 14 B parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same: it takes no time")
    parser.parse_args()
    lines, figures = [], {}
    for machines in MACHINES:
        background, blocking = (cost(STATE, machines * GPUS, machines, kind) for kind in (True, False))
        mtbf = between_failures(machines, RATES["RSC-1"])
        found = {
            "h between failures": mtbf / 3600,
            "min between checkpoints": interval(background, mtbf) / 60,
            "goodput %": 100 * goodput(interval(background, mtbf), background, mtbf),
            "blocking %": 100 * goodput(interval(blocking, mtbf), blocking, mtbf),
            "each hour %": 100 * goodput(3600.0, background, mtbf),
        }
        mtbf = between_failures(machines, RATES["Llama 3"])
        found["Llama 3: h"] = mtbf / 3600
        found["Llama 3: goodput %"] = 100 * goodput(interval(background, mtbf), background, mtbf)
        figures[machines] = {name: round(value, 2) for name, value in found.items()}
        lines.append([f"{machines:,}", *(f"{value:,.1f}" for value in found.values())])
    print(f"14 B parameters, {STATE / 1e9:.0f} GB; 5 minutes from a failure to the next first step; RSC-1's failures")
    print(table(["machines", *next(iter(figures.values()))], lines))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
