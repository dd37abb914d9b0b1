"""The overrides of a command line (`model=169m optim.lr=1e-3 +callbacks.x._target_=…`), parsed and sorted for Hydra.

Hydra checks a setting's spelling by itself and advises to append an unknown one with `+`, which is the wrong remedy for
a typo. So every setting is passed to Hydra as one that may be new (`++`), and config/schema.py reports unknown ones,
whether they were typed or are in a file.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from rwkv_train.config.schema import OPEN_TREES, FlatSettings, flatten, schema
from rwkv_train.config.suggestions import nearest, suggestion
from rwkv_train.config.values import show
from rwkv_train.errors import UserError, UserErrors

LAYERED_GROUPS = (
    "experiment",
    "debug",
    "local",
)  # they change settings of other groups, in this order


@dataclass
class Overrides:
    """The overrides of one command line.

    Attributes:
        choices: for Hydra: group=name.
        values: for Hydra: ++setting=value.
        typed: setting → value.
        problems: what is wrong with those that are in neither list.
    """

    choices: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    typed: FlatSettings = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)

    def choosing(self, choice: str) -> Overrides:
        """The same overrides with one more choice, such as "arch=rwkv4"."""
        return replace(self, choices=[*self.choices, choice])

    def chooses(self, group: str) -> bool:
        """Whether a choice of the group was typed."""
        return any(choice.startswith(f"{group}=") for choice in self.choices)


class OverrideParser:
    """Parses command lines; Hydra must be initialised.

    Args:
        groups: group → names of its choices.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]]) -> None:
        self.groups = groups
        self.schema = schema()
        self.hydra_parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())

    def expand(self, texts: Sequence[str]) -> list[list[str]]:
        """The command lines of a multirun: `a=1,2 b=3,4` is four of them.

        Raises:
            UserErrors: overrides that cannot be parsed or expanded.
        """
        parsed, problems = self._parse(texts)
        if problems:
            raise UserErrors(problems)
        try:
            lines: list[list[str]] = BasicSweeper.split_arguments(parsed, None)[0]
        except HydraException as error:
            raise UserError(f"-m: {error}", "lists (a=1,2), range(…), choice(…) and glob(…) can be expanded") from None
        return lines

    def sort(self, texts: Sequence[str]) -> Overrides:
        """The overrides of a single command line; errors are in `problems`."""
        overrides = Overrides()
        parsed, overrides.problems = self._parse(texts)
        for override in parsed:
            problem = self._refusal(override)
            if problem is not None:
                overrides.problems.append(problem)
            elif override.key_or_group in self.groups:
                overrides.choices.append((override.input_line or "").lstrip("+~"))
            elif override.type == OverrideType.DEL:
                overrides.values.append(override.input_line or "")
            else:
                overrides.values.append("++" + (override.input_line or "").lstrip("+~"))
                overrides.typed.update(flatten({override.key_or_group: override.value()}))
        return overrides

    def _parse(self, texts: Sequence[str]) -> tuple[list[Override], list[UserError]]:
        parsed, problems = [], []
        for text in texts:
            override = self._parse_one(text)
            if override is not None:
                parsed.append(override)
            elif "=" in text:
                name, _, value = text.partition("=")
                problems.append(
                    UserError(f"{text} cannot be parsed", f"quote it for the shell and for Hydra: '{name}=\"{value}\"'")
                )
            else:
                problems.append(UserError(f"{text!r} is not an override", "type setting=value, e.g. model=169m"))
        return parsed, problems

    def _parse_one(self, text: str) -> Override | None:
        """None: it cannot be parsed. Text needs no quotes: a path may hold any character, a name may be 1e5."""
        name, equals, value = text.partition("=")
        hint = self.schema.get(name)
        override: Override | None = None
        with suppress(HydraException):
            (override,) = self.hydra_parser.parse_overrides([text])
        if equals and self._is_text_setting(name) and (override is None or not _is_text(override)):
            (override,) = self.hydra_parser.parse_overrides([f"{name}={_quoted(value)}"])
        if override is None and hint == tuple[str, ...] and value[:1] + value[-1:] == "[]":
            items = ",".join(_quoted(item.strip("'\" ")) for item in value[1:-1].split(","))  # such as <|user|>
            (override,) = self.hydra_parser.parse_overrides([f"{name}=[{items}]"])
        return override

    def _is_text_setting(self, name: str) -> bool:
        return self.schema.get(name) in (str, str | None)

    def _refusal(self, override: Override) -> UserError | None:
        """Why a parsed override is not accepted; None: it is."""
        name, text = override.key_or_group, override.input_line or ""
        top = name.split(".")[0]
        if override.is_sweep_override():
            return UserError(
                f"{text}: several values for one run",
                "add -m to run them one after the other; a list is [a,b]"
                + (f"; one text with a comma: {_requoted(name, text)}" if self._is_text_setting(name) else ""),
            )
        if top == "hydra" or top.startswith("hydra/"):
            return UserError(
                f"{text}: Hydra only composes the configuration", "run.root= and run.name= set the run directory"
            )
        if override.type == OverrideType.DEL:
            if top in OPEN_TREES and name not in OPEN_TREES:
                return None
            return UserError(f"{text}: a setting cannot be removed", f"{name}=null, if it may be without a value")
        if name in self.groups:
            value = override.value()
            return self._check_choice(name, value if isinstance(value, list) else [value])
        if name == "model.size":
            return UserError(f"{text}: the size is chosen by model=", f"valid: {', '.join(self.groups['model'])}")
        if override.type in (OverrideType.ADD, OverrideType.FORCE_ADD) and top not in OPEN_TREES:
            near = name if name in self.schema else nearest(name, [*self.schema, *self.groups])
            return UserError(
                f"{text}: + adds settings below {', '.join(OPEN_TREES[:-1])} and {OPEN_TREES[-1]} only",
                f"nearest: {near}=" if near else "--help lists all settings",
            )
        return None

    def _check_choice(self, group: str, names: Sequence[Any]) -> UserError | None:
        valid = self.groups[group]
        for name in names:
            optional = group in LAYERED_GROUPS or group == "logger"
            if str(name) not in valid and not (name is None and optional):
                return UserError(f"{group}={show(name)}: there is no such {group}", suggestion(str(name), valid))
        return None


def _quoted(text: str) -> str:
    """A quoted string of Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _requoted(name: str, text: str) -> str:
    """An override whose value is one text, as it is typed in a shell."""
    return shlex.quote(f'{name}="{text.partition("=")[2]}"')


def _is_text(override: Override) -> bool:
    return bool(override.is_sweep_override()) or override.value() is None or isinstance(override.value(), str)
