"""The cost of reading batches from a store, against the usual implementations.

    python benchmarks/loader.py [--quick]

tokens_per_s    tokens that reach (tokens, targets) batches per second, from a store in page cache, T 4096
vs_best_peer    against the fastest of the peers, each in its fastest setting, in turn in the same process:
                Megatron-style indexing (a memory map, numpy, torch's DataLoader, as RWKV-LM trains), and `datasets`
                with set_format("torch")
first_batch_s   opening a store of 10^6 documents and making its first batch
resume_1e6_vs_0 the same, going on at step 10^6, against step 0
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from measure import in_turn, seconds, table
from torch.utils.data import DataLoader, Dataset

from rwkv_train.config import BatchSettings, DataSettings
from rwkv_train.data.batches import Batches
from rwkv_train.data.indexed import write_index

CONTEXT, MICRO = 4096, 8


def write_store(stem: Path, documents: int, mean: int) -> None:
    """Documents of random tokens with random lengths."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(mean // 2, mean * 3 // 2, documents).astype(np.int32)
    with open(f"{stem}.bin", "wb") as file:
        left = int(lengths.sum())
        while left:
            count = min(left, 2**24)
            file.write(draw.integers(1, 65530, count, dtype=np.uint16).tobytes())
            left -= count
    write_index(Path(f"{stem}.idx"), np.uint16, lambda: iter([lengths]))


def open_ours(stem: Path) -> Batches:
    data = DataSettings("store", str(stem), "world", 0.0)
    return Batches(data, BatchSettings(CONTEXT * MICRO, CONTEXT, None), seed=1)


class Megatron(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A memory map and one sample at a time, as in RWKV-LM's dataset.py."""

    def __init__(self, stem: Path) -> None:
        self.tokens = np.memmap(f"{stem}.bin", np.uint16, "r")
        self.places = np.random.default_rng(0).permutation(len(self.tokens) // CONTEXT - 1)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = int(self.places[index]) * CONTEXT
        window = self.tokens[begin : begin + CONTEXT + 1].astype(np.int64)
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])


def as_dataset(stem: Path, folder: Path) -> datasets.Dataset:
    """The same windows as rows of an Arrow file, as packed data sets are kept."""
    tokens = np.memmap(f"{stem}.bin", np.uint16, "r")
    rows = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)[:4000]
    made = datasets.Dataset.from_dict({"tokens": rows.astype(np.int32)})
    made.save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder)).with_format("torch")


def rate(batches: Callable[[], Iterator[Any]], count: int) -> Callable[[], None]:
    """Takes that many batches."""

    def run() -> None:
        for tokens, targets in islice(batches(), count):
            assert tokens.shape == targets.shape == (MICRO, CONTEXT)

    return run


def from_rows(loader: Any) -> Iterator[Any]:
    for batch in loader:
        tokens = batch["tokens"].long()
        yield tokens, tokens.roll(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer batches and rounds, under 50 s")
    quick = parser.parse_args().quick
    count, rounds = (100, 3) if quick else (400, 7)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        stem = Path(name, "store")
        write_store(stem, 10**6, 100 if quick else 400)
        data = open_ours(stem)
        megatron, rows = Megatron(stem), as_dataset(stem, Path(name, "rows"))
        loaders: dict[str, Callable[[], Iterator[Any]]] = {"rwkv_train": lambda: iter(data.training())}
        for workers in (0, 2):
            loaders[f"Megatron-style, {workers} workers"] = lambda workers=workers: iter(
                DataLoader(megatron, MICRO, num_workers=workers)
            )
            loaders[f"datasets, {workers} workers"] = lambda workers=workers: from_rows(
                DataLoader(rows, MICRO, shuffle=True, num_workers=workers)  # type: ignore[arg-type]
            )
        times = in_turn({name: rate(batches, count) for name, batches in loaders.items()}, rounds)
        rates = {name: count * MICRO * CONTEXT / statistics.median(taken) for name, taken in times.items()}

        def begin(step: int) -> Callable[[], None]:
            def run() -> None:
                opened = open_ours(stem)
                opened.begin(step, None)
                next(iter(opened.training()))

            return run

        first = [seconds(begin(0))]
        opening = in_turn({"0": begin(0), "1e6": begin(10**6)}, 3 * rounds)
        first += opening["0"]
    peers = [speed for name, speed in rates.items() if name != "rwkv_train"]
    print(table(["loader", "million tokens/s"], [[name, f"{speed / 1e6:.1f}"] for name, speed in rates.items()]))
    figures = {
        "tokens_per_s": round(rates["rwkv_train"]),
        "vs_best_peer": round(rates["rwkv_train"] / max(peers), 2),
        "first_batch_s": round(max(first), 4),
        "resume_1e6_vs_0": round(statistics.median(opening["1e6"]) / statistics.median(opening["0"]), 3),
    }
    print(f"opening and first batch: {figures['first_batch_s']:.3f} s at worst")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
