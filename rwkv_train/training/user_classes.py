"""The loggers and callbacks that a user names by `_target_`, bound to their arguments before a run begins."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from rwkv_train.config import Config
from rwkv_train.instantiate import Makers, prepare
from rwkv_train.trackers import LocalTracker, Tracker


def prepare_callbacks(config: Config) -> Makers[Callback]:
    """A factory for each callback of `callbacks`.

    Raises:
        UserErrors: callbacks that cannot be found, or whose arguments do not fit.
    """
    return prepare("callbacks", config.callbacks, Callback, config.packages)


def prepare_loggers(config: Config) -> dict[str, Any]:
    """The trees of `logger`, checked.

    Raises:
        UserErrors: loggers that cannot be found, or whose arguments do not fit.
    """
    prepare("logger", config.logger, (Tracker, LocalTracker, Logger), config.packages)
    return config.logger
