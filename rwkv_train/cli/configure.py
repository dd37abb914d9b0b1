"""From a command line to a checked Config: parse (overrides.py), compose, fill what is open, read, check, name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir

from rwkv_train.cli.checks import Machine, check
from rwkv_train.cli.compose import compose_settings
from rwkv_train.cli.conf_folders import ConfFolders
from rwkv_train.cli.overrides import OverrideParser
from rwkv_train.cli.published import fill_open_settings, weights_config
from rwkv_train.config import Config
from rwkv_train.config.interpolation import resolved_open_tree
from rwkv_train.config.schema import OPEN_TREES, FlatSettings, as_tree, identity, read
from rwkv_train.errors import UserError, UserErrors


class ConfigBuilder:
    """Builds the configs of command lines; made by `config_builder`, which initialises Hydra.

    Args:
        conf: the conf folders.
        machine: what the settings are checked against.
    """

    def __init__(self, conf: ConfFolders, machine: Machine) -> None:
        self.conf, self.machine = conf, machine
        self.parser = OverrideParser(conf.groups)

    def build(self, texts: Sequence[str]) -> Config:
        """The checked config of one command line.

        Raises:
            UserErrors: everything that is wrong with it.
        """
        overrides = self.parser.sort(texts)
        try:
            composed = compose_settings(self.conf, overrides)
            weights = weights_config(composed.settings)
            if weights is not None and weights.arch != composed.settings["arch"] and not overrides.chooses("arch"):
                composed = compose_settings(self.conf, overrides.choosing(f"arch={weights.arch}"))
        except UserErrors as error:
            raise UserErrors([*overrides.problems, *error.problems]) from None
        problems = [
            *overrides.problems,
            *fill_open_settings(composed, self.conf, weights, overrides.typed, overrides.chooses("model")),
        ]
        config, found = self._read_and_check(composed.settings, composed.open_trees)
        problems += found
        if problems or config is None:
            raise UserErrors(problems)
        if composed.settings.get("run.name") is None:
            config = replace(config, run=replace(config.run, name=_default_name(config)))
        config = self._with_devices_of_job(config)
        for name in OPEN_TREES:
            resolved_open_tree(config, name)  # only that it can be resolved; it is where the tree is used
        return replace(config, resume_typed="resume" in overrides.typed)

    def _read_and_check(
        self, settings: FlatSettings, open_trees: dict[str, Any]
    ) -> tuple[Config | None, list[UserError]]:
        name = settings.get("run.name")
        config, problems = read({**settings, "run.name": "unnamed" if name is None else name, **open_trees})
        problems += _check_targets(open_trees)
        if config is not None:
            problems += check(self._with_devices_of_job(config), self.machine)
        return config, problems

    def _with_devices_of_job(self, config: Config) -> Config:
        """The config with the nodes and devices of the job in place of auto; the run's name does not depend on them."""
        trainer, rank_info = config.trainer, self.machine.rank_info
        if rank_info.starter == "plain" or config.dry_run:
            return config
        nodes = rank_info.nodes if trainer.num_nodes == "auto" else trainer.num_nodes
        devices = rank_info.per_node if trainer.devices == "auto" else trainer.devices
        return replace(config, trainer=replace(trainer, num_nodes=nodes, devices=devices))


@contextmanager
def config_builder(folders: Sequence[Path], machine: Machine) -> Iterator[ConfigBuilder]:
    """Initialises Hydra for the conf folders; the first one holds train.yaml."""
    with initialize_config_dir(config_dir=str(folders[0]), version_base="1.3", job_name="train"):
        yield ConfigBuilder(ConfFolders(folders), machine)


def _default_name(config: Config) -> str:
    """The name of a run without run.name: arch, size and a hash of the settings that define the run."""
    digest = sha256(dumps(identity(as_tree(config)), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.arch}-{config.model.size}-{digest}"


def _check_targets(open_trees: dict[str, Any]) -> Iterator[UserError]:
    """Every logger and callback names its class; instantiate.py checks whether the class exists."""
    for top, tree in open_trees.items():
        if top == "launcher":
            continue  # its class is fixed
        for name, entry in (tree or {}).items():
            if not isinstance(entry, dict) or "_target_" not in entry:
                yield UserError(
                    f"{top}.{name} has no _target_",
                    f"+{top}.{name}._target_=PACKAGE.CLASS, or {top}=NAME from conf/{top}",
                )
