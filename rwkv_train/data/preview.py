"""A run's first batch, shown: `rwkv-train prepare show`, and before step 0 of a run whose loss is masked."""

from __future__ import annotations

from rich.console import Console

from rwkv_train.config import Config
from rwkv_train.data.batches import Batches
from rwkv_train.data.show import show_batch


def preview(config: Config) -> None:
    """Prints the first batch that one device would get.

    Raises:
        UserError: the data cannot be read.
    """
    data = Batches(config.data, config.batch, config.seed, extend=config.vocab.extend)
    console = Console(highlight=False)
    console.print(data.description, markup=False)
    show_batch(data.batch(0), data.tokenizer, console)
