"""Interpolations: `${run.name}`, `${oc.env:KEY}`. Those of the open trees stay as they are written until they are used.

What a config records (config.yaml, checkpoints, replay files, trackers) therefore holds no secret that a logger or a
callback gets from the environment.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rwkv_train.config.schema import as_tree
from rwkv_train.config.settings import Config
from rwkv_train.errors import UserError, UserErrors


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain values, with all interpolations resolved.

    Raises:
        UserErrors: an interpolation that cannot be resolved.
    """
    try:
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserErrors([UserError(str(error).splitlines()[0], "correct the ${…} that it names")]) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def resolved_open_tree(config: Config, name: str) -> dict[str, Any]:
    """An open tree with its interpolations resolved, which is never to be written down.

    Args:
        config: of the run, to whose settings the tree may refer.
        name: one of OPEN_TREES.

    Raises:
        UserErrors: an interpolation that cannot be resolved.
    """
    if not getattr(config, name):
        return {}
    return resolve(OmegaConf.create(as_tree(config))[name])
