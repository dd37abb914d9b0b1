"""From a checked config to a trained model: what `python train.py` and `rwkv-train train` call."""

from __future__ import annotations

import re
import sys

from rwkv_train.checkpoint.storage import Storage
from rwkv_train.cluster.rank_info import RankInfo, another_has_ended
from rwkv_train.config import Config
from rwkv_train.exit_codes import ExitCode
from rwkv_train.training.attempt import checkpoint_to_resume
from rwkv_train.training.setup import assemble
from rwkv_train.training.user_classes import prepare_loggers


def train(config: Config, storage: Storage | None = None, rank_info: RankInfo | None = None) -> int:
    """Trains by the config, and resumes where a run of that name was left.

    Args:
        config: settled and checked.
        storage: of the checkpoints; None: the local file system.
        rank_info: of this process, None: the only one; only rank 0 prints and writes.

    Returns:
        the exit code: see exit_codes.py.

    Raises:
        UserError: what shows only with the data, the devices or the checkpoint at hand. Nothing was written then.
    """
    if config.dry_run:
        from rwkv_train.training.dry_run import dry_run

        return dry_run(config)
    if config.replay is not None:
        from rwkv_train.training.replay import replayed

        with replayed(config, rank_info is None or rank_info.rank == 0) as again:
            return _train(again, storage, rank_info)
    return _train(config, storage, rank_info)


def _train(config: Config, storage: Storage | None, rank_info: RankInfo | None) -> int:
    setup = assemble(config, storage, rank_info)
    checkpoint_to_resume(setup)
    if setup.first:
        setup.directory.refuse_unusable(setup.rank_info.job)
    prepare_loggers(config)
    from rwkv_train.training.loop import fit  # Lightning takes seconds to import: user errors come first

    try:
        return fit(setup)
    except RuntimeError as error:
        message = str(error)
        if re.search("EADDRINUSE|address already in use", message, re.IGNORECASE):
            print(  # processes of the last start may still end: starting again may help
                f"error: the port over which the ranks find each other is in use: {message.splitlines()[0][:200]}\n"
                "  the same command again, or MASTER_PORT=NUMBER before it for another port",
                file=sys.stderr,
            )
            return ExitCode.FAILED
        if setup.resolved.mesh.ranks > 1 and another_has_ended(error):
            print(
                f"rank {setup.rank_info.rank} on {setup.rank_info.node} ends: another rank of the run has ended",
                file=sys.stderr,
            )
            return ExitCode.FAILED
        raise
