"""`make golden` recomputes the golden losses: 50 tiny CPU steps of the definition. Give the reason in the commit."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rwkv_train import ops
from rwkv_train.cli import launcher
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for

GOLDEN = Path(__file__).resolve().parent / "rwkv4.txt"


def main() -> None:
    ops.ENGINE = "reference"
    with tempfile.TemporaryDirectory() as folder:
        assert train(launcher.load(overrides_for(Path(folder)))) == 0
        GOLDEN.write_text("".join(f"{loss:.9f}\n" for loss in losses(Path(folder) / "runs" / "run")))


if __name__ == "__main__":
    main()
