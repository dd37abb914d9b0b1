"""`make golden` recomputes the golden losses: 50 tiny CPU steps of the definition. Give the reason in the commit."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rwkv_train import ops
from rwkv_train.cli import launcher
from rwkv_train.models import ARCHITECTURES
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for

FOLDER = Path(__file__).resolve().parent
# Overrides, by architecture. With a learning rate of 1e-2 RWKV-7 makes 1e-4 of rounding differences in 50 steps.
OVERRIDES = {"rwkv4": (), "rwkv7": ("model.head_size=8", "optim.lr=2e-3", "optim.final_lr=5e-4")}


def overrides_of(arch: str, folder: Path, name: str = "run", *more: str) -> list[str]:
    """The overrides of the run whose losses are golden, and further ones."""
    return overrides_for(folder, name, f"arch={arch}", *OVERRIDES[arch], *more)


def golden_losses(arch: str) -> list[float]:
    return [float(line) for line in (FOLDER / f"{arch}.txt").read_text().split()]


def make(arch: str) -> None:
    ops.ENGINE = "reference"
    with tempfile.TemporaryDirectory() as folder:
        assert train(launcher.load(overrides_of(arch, Path(folder)))) == 0
        found = losses(Path(folder) / "runs" / "run")
        (FOLDER / f"{arch}.txt").write_text("".join(f"{loss:.9f}\n" for loss in found))


if __name__ == "__main__":
    for arch in sys.argv[1:] or ARCHITECTURES:
        make(arch)
