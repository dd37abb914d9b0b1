"""The loggers and callbacks that a user names by `_target_`, bound to their arguments before a run begins.

Their interpolations are resolved here, where they are about to be made; a config and its records hold them as written.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from rwkv_train.config import Config
from rwkv_train.config.interpolation import resolved_open_tree
from rwkv_train.instantiate import Makers, prepare
from rwkv_train.trackers import LocalTracker, Tracker


def prepare_callbacks(config: Config) -> Makers[Callback]:
    """A factory for each callback of `callbacks`.

    Raises:
        UserErrors: callbacks that cannot be found, or whose arguments do not fit.
    """
    return prepare("callbacks", resolved_open_tree(config, "callbacks"), Callback, config.packages)


def prepare_loggers(config: Config) -> dict[str, Any]:
    """The trees of `logger`, checked, with all interpolations resolved: for the trackers only.

    Raises:
        UserErrors: loggers that cannot be found, or whose arguments do not fit.
    """
    trees = resolved_open_tree(config, "logger")
    prepare("logger", trees, (Tracker, LocalTracker, Logger), config.packages)
    return trees
