"""From a checked config to a trained model: what both front doors call."""

from __future__ import annotations

import platform
import re
import sys

from rwkv_train.config import Config
from rwkv_train.errors import UserError
from rwkv_train.training.checkpoint.storage import Storage
from rwkv_train.training.parts import assemble

RANK_LOST = 1  # exit code


def train(config: Config, storage: Storage | None = None, rank: int = 0) -> int:
    """Trains as the config says; goes on where a run of that name was left.

    Args:
        config: settled and checked.
        storage: of the checkpoints; None: the local file system.
        rank: of this process; only the first one speaks and writes.

    Returns:
        the exit code: 0, 3 where the disk refused a checkpoint or a record, 75 where a signal stopped it.

    Raises:
        UserError: what shows only with the data, the devices or the checkpoint at hand. Nothing was written then.
    """
    if config.dry_run:
        from rwkv_train.training.dry import dry_run

        return dry_run(config)
    if config.replay is not None:
        from rwkv_train.training.replay import replayed

        with replayed(config, rank == 0) as again:
            return _train(again, storage, rank)
    return _train(config, storage, rank)


def _train(config: Config, storage: Storage | None, rank: int) -> int:
    parts = assemble(config, storage, rank)
    from rwkv_train.training.fit import fit  # Lightning takes seconds to import: after the mistakes

    try:
        return fit(parts)
    except RuntimeError as error:  # torch.distributed has no type of its own for either
        told = str(error)
        if re.search("EADDRINUSE|address already in use", told, re.IGNORECASE):
            raise UserError(
                f"the port over which the processes find each other is in use: {told.splitlines()[0][:200]}",
                "MASTER_PORT=NUMBER before the command chooses another one",
            ) from None
        if parts.data.split.ranks > 1 and re.search("connection (closed|reset)|broken pipe", told, re.IGNORECASE):
            print(f"rank {rank} on {platform.node()} ends: another rank of the run has ended", file=sys.stderr)
            return RANK_LOST
        raise
