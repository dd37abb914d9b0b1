"""Hydra composes the conf folders and the overrides of a command line into one tree of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rwkv_train.cli.conf_folders import ConfFolders, not_yaml
from rwkv_train.cli.overrides import LAYERED_GROUPS, Overrides
from rwkv_train.config.interpolation import resolve
from rwkv_train.config.schema import OPEN_TREES, UNITS, FlatSettings, durations, flatten
from rwkv_train.errors import UserError, UserErrors


@dataclass
class Composed:
    """What Hydra made of a command line.

    Attributes:
        settings: name → plain value, without the open trees; interpolations are resolved.
        open_trees: logger, callbacks and launcher as they are written (interpolation.py).
        sources: what sets each setting above the published configuration of the size, weakest first: another optim
            than the default's, the groups of LAYERED_GROUPS, the command line.
    """

    settings: FlatSettings
    open_trees: dict[str, Any]
    sources: list[FlatSettings]


def compose_settings(conf: ConfFolders, overrides: Overrides) -> Composed:
    """Composes the settings of one command line; Hydra must be initialised with the first conf folder.

    Raises:
        UserErrors: a conf file that cannot be read, an interpolation that leads nowhere.
    """
    further = ",".join(f"file://{folder}" for folder in conf.folders[1:])
    search = [f"hydra.searchpath=[{further}]"] if further else []
    try:
        cfg = compose("train", [*search, *overrides.choices, *overrides.values], return_hydra_config=True)
        chosen = dict(cfg.hydra.runtime.choices)
        open_trees = {name: OmegaConf.to_container(cfg[name]) if name in cfg else {} for name in OPEN_TREES}
        OmegaConf.set_struct(cfg, False)
        for name in ("hydra", *OPEN_TREES):
            cfg.pop(name, None)
        tree = resolve(cfg)
    except yaml.YAMLError as error:
        raise UserErrors([not_yaml(error)]) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserErrors([UserError(" ".join(str(error).split()))]) from None
    tree.get("model", {}).pop("published", None)
    settings = flatten(tree)
    sources = [*(conf.read(group, chosen.get(group)) for group in LAYERED_GROUPS), overrides.typed]
    if overrides.chooses("optim") or chosen.get("optim") != conf.default("optim"):
        held = conf.read("optim", chosen.get("optim"))
        optim = {f"optim.{n}": value for n, value in held.items() if value is not None and n != "defaults"}
        settings.update({n: value for n, value in optim.items() if not any(n in source for source in sources)})
        sources = [optim, *sources]
    return Composed(settings, open_trees, sources)


def settle_durations(settings: FlatSettings, sources: Sequence[Mapping[str, Any]]) -> None:
    """Where both units of a duration are set, keeps the one that the last of the sources sets.

    Merging cannot do that: budget.tokens=1B on the command line leaves the budget.steps of train.yaml. A source that
    sets both at once is left as it is; read() refuses it.
    """
    for name in durations():
        units: list[str] = []
        for source in sources:
            units = [unit for unit in UNITS if source.get(f"{name}.{unit}") is not None] or units
        if len(units) == 1:
            (other,) = set(UNITS) - set(units)
            settings[f"{name}.{other}"] = None
