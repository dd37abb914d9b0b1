"""The conf folders read as plain files, without Hydra: the choices of each group, and what each of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rwkv_train.config.schema import FlatSettings, flatten
from rwkv_train.errors import UserError


class ConfFolders:
    """conf/ and, with --config-dir, a folder of the user's own.

    Args:
        folders: the first one holds train.yaml; the others may add choices to its groups.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Group → the names of its choices, sizes in ascending order."""
        found: dict[str, set[str]] = {}
        for folder in self.folders:
            for file in folder.glob("*/**/*.yaml"):
                group, *path = file.relative_to(folder).with_suffix("").parts
                found.setdefault(group, set()).add("/".join(path))
        return {group: sorted(names, key=_by_size) for group, names in sorted(found.items())}

    def read(self, group: str, name: Any) -> FlatSettings:
        """The settings in a choice's file, as they are written; empty if there is no such file.

        Raises:
            UserError: the file is not YAML.
        """
        for folder in self.folders:
            file = folder / group / f"{name}.yaml"
            if file.is_file():
                try:
                    return flatten(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
                except yaml.YAMLError as error:
                    raise not_yaml(error) from None
        return {}

    def default(self, group: str) -> str | None:
        """The choice of a group in train.yaml."""
        return next((entry[group] for entry in self._defaults if isinstance(entry, dict) and group in entry), None)

    @cached_property
    def _defaults(self) -> list[Any]:
        return list(self.read(".", "train").get("defaults", []))

    @cached_property
    def published(self) -> dict[str, dict[str, FlatSettings]]:
        """The published configurations: size → arch → row, as in the files of conf/model."""
        found: dict[str, dict[str, FlatSettings]] = {}
        for size in self.groups.get("model", ()):
            for name, value in self.read("model", size).items():
                top, _, rest = name.partition(".")
                arch, _, key = rest.partition(".")
                if top == "published":
                    found.setdefault(size, {}).setdefault(arch, {})[key] = value
        return found


def not_yaml(error: yaml.YAMLError) -> UserError:
    """The error for a conf file that cannot be parsed; it names the file and the line."""
    return UserError(f"a conf file is not valid YAML: {' '.join(str(error).split())}", "correct that line")


def _by_size(name: str) -> tuple[int, float, str]:
    """Sort key: names such as 169m and 1b5 by the number of parameters, after all others."""
    scale = {"m": 1e6, "b": 1e9}
    unit = next((letter for letter in "mb" if name[:1].isdigit() and letter in name), None)
    return (0, 0.0, name) if unit is None else (1, float(name.replace(unit, ".").rstrip(".")) * scale[unit], name)
