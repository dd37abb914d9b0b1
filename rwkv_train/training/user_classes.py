"""The loggers and callbacks that a user names by `_target_`, bound to their arguments before a run begins.

Their interpolations are resolved here, where they are about to be made; a config and its records hold them as written.
Lightning, which takes seconds to import, is imported only for what it is needed for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rwkv_train.config import Config
from rwkv_train.config.interpolation import resolved_open_tree
from rwkv_train.instantiate import Makers, prepare
from rwkv_train.trackers import LocalTracker, Tracker

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

_OURS = "rwkv_train."


def prepare_callbacks(config: Config) -> Makers[Callback]:
    """A factory for each callback of `callbacks`.

    Raises:
        UserErrors: callbacks that cannot be found, or whose arguments do not fit.
    """
    from lightning.pytorch.callbacks import Callback

    return prepare("callbacks", resolved_open_tree(config, "callbacks"), Callback, config.packages)


def prepare_loggers(config: Config) -> dict[str, Any]:
    """The trees of `logger`, checked, with all interpolations resolved: for the trackers only.

    Raises:
        UserErrors: loggers that cannot be found, or whose arguments do not fit.
    """
    trees = resolved_open_tree(config, "logger")
    others = {name: tree for name, tree in trees.items() if not _is_ours(tree)}
    ours = {name: tree for name, tree in trees.items() if _is_ours(tree)}
    prepare("logger", ours, (LocalTracker, Tracker), config.packages)
    if others:
        from lightning.pytorch.loggers import Logger

        prepare("logger", others, (Tracker, LocalTracker, Logger), config.packages)
    return trees


def _is_ours(tree: Any) -> bool:
    return isinstance(tree, Mapping) and str(tree.get("_target_")).startswith(_OURS)
