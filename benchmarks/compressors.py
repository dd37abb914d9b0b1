"""Classical compressors on the default run's held-out files, each primed with its training files: nats per byte.

    python benchmarks/compressors.py

lzma    preset 6, as the summary of a run has it
zstd    level 19, long matches over the whole text
ppmd    variant H of order 16 with 1 GB of memory; needs `pip install pyppmd`, else it is left out

A compressor's figure is the size of training and held-out text together less that of the training text alone.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import zstandard

from rwkv_train.cli import launcher
from rwkv_train.data.corpus import join, read_corpus
from rwkv_train.data.tokenizers import ByteTokenizer
from rwkv_train.evaluation.baselines import lzma_loss


def zstd(text: bytes) -> int:
    parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=27, enable_ldm=True)
    return len(zstandard.ZstdCompressor(compression_params=parameters).compress(text))


def ppmd(text: bytes) -> int:
    import pyppmd

    return len(pyppmd.compress(text, max_order=16, mem_size=1 << 30, variant="H"))


def main() -> None:
    corpus = read_corpus(launcher.load([]).data)
    train, held_out = (join(part, ByteTokenizer()).tokens for part in (corpus.train, corpus.held_out))
    figures = {"bytes": len(held_out), "lzma": lzma_loss(train, held_out)}
    compressors: dict[str, Callable[[bytes], int]] = {"zstd": zstd}
    if find_spec("pyppmd"):
        compressors["ppmd"] = ppmd
    for name, size in compressors.items():
        added = size(np.concatenate((train, held_out)).tobytes()) - size(train.tobytes())
        figures[name] = added * 8 * math.log(2) / len(held_out)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
