"""Settings by name ↔ the typed Config. Everything here is derived from the classes of settings.py.

The name of a setting is what is typed before the `=`, such as `model.n_layer`: its path through the classes, unless the
field's metadata give another. A Duration is two settings, `….steps` and `….tokens`, of which at most one is not null.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from rwkv_train.config.settings import Config, Duration, NotNegative
from rwkv_train.config.suggestions import nearest, unknown
from rwkv_train.config.values import convert, describe, plain, show
from rwkv_train.errors import UserError, UserErrors

FlatSettings = dict[str, Any]  # name → plain value; lists of settings stay lists, the open trees stay trees

OPEN_TREES = ("logger", "callbacks", "launcher")  # trees that take any keys: the arguments of classes that are not ours
TREES = (*OPEN_TREES, "model.extra")  # settings whose value is a tree
UNITS = ("steps", "tokens")


class Setting(NamedTuple):
    """A setting.

    Attributes:
        name: as it is typed.
        hint: its type; bounds are in an Annotated.
        role: "placement", "operation" (see settings.py), or "" where it defines the run.
        value: its plain value, if a config was given.
    """

    name: str
    hint: Any
    role: str
    value: Any


class DurationHint(NamedTuple):
    """The type of a duration: that of its number, and whether one must be given."""

    number: Any
    required: bool


def all_settings(config: Config | None = None) -> Iterator[Setting]:
    """Every setting in the order of the classes; with the values of a config, if one is given."""
    for setting in _leaves(Config, config):
        duration = _duration(setting.hint)
        if duration is None:
            yield setting._replace(value=plain(setting.value))
            continue
        for unit in UNITS:
            value = getattr(setting.value, unit, None)
            yield Setting(f"{setting.name}.{unit}", duration.number | None, setting.role, value)


@cache
def schema() -> Mapping[str, Any]:
    """Name → type of every setting."""
    return MappingProxyType({setting.name: setting.hint for setting in all_settings()})


@cache
def durations() -> Mapping[str, DurationHint]:
    """Every duration: name (without the unit) → its type."""
    found = {setting.name: _duration(setting.hint) for setting in _leaves(Config)}
    return MappingProxyType({name: hint for name, hint in found.items() if hint is not None})


def flatten(tree: Mapping[str, Any], prefix: str = "") -> FlatSettings:
    """{"model": {"n_layer": 4}} → {"model.n_layer": 4}. TREES, lists and empty trees stay as they are."""
    flat: FlatSettings = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        inner = isinstance(value, Mapping) and value and name not in TREES
        flat.update(flatten(value, f"{name}.") if inner else {name: value})
    return flat


def as_tree(config: Config) -> dict[str, Any]:
    """A config as nested dicts, lists and plain values: the content of config.yaml and of checkpoints."""
    tree: dict[str, Any] = {}
    for setting in all_settings(config):
        *path, last = setting.name.split(".")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = setting.value
    return tree


def from_tree(tree: Mapping[str, Any]) -> Config:
    """The inverse of as_tree.

    Raises:
        UserErrors: all unknown and missing settings, wrong types and values out of bounds.
    """
    config, problems = read(flatten(tree))
    if config is None or problems:
        raise UserErrors(problems)
    return config


def read(settings: FlatSettings) -> tuple[Config | None, list[UserError]]:
    """The typed config (None where a value cannot be converted), and everything that is wrong with single settings."""
    problems, known = [], schema()
    values: FlatSettings = {}
    for name, hint in known.items():
        if name not in settings:
            problems.append(UserError(f"{name} is missing", f"valid: {describe(hint)}"))
            continue
        try:
            values[name] = convert(hint, settings[name])
        except ValueError:
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            near = nearest(str(settings[name]), choices)
            remedy = f"valid: {describe(hint)}" + (f"; nearest: {near}" if near else "")
            problems.append(UserError(f"{name}={show(settings[name])} is not valid", remedy))
    config = _build(Config, values) if not problems else None
    problems += _check_durations(values)
    problems += [unknown(name, settings[name], [*known, *OPEN_TREES]) for name in settings if name not in known]
    return config, problems


def _check_durations(values: FlatSettings) -> Iterator[UserError]:
    for name, hint in durations().items():
        if not all(f"{name}.{unit}" in values for unit in UNITS):
            continue  # reported already
        steps, tokens = (values[f"{name}.{unit}"] for unit in UNITS)
        if steps is not None and tokens is not None:
            yield UserError(f"{name}.steps={steps} and {name}.tokens={tokens} exclude each other", "give one of them")
        elif steps is None and tokens is None and hint.required:
            yield UserError(f"{name} is not given", f"{name}.steps=… or {name}.tokens=…")


def identity(tree: Mapping[str, Any]) -> FlatSettings:
    """The settings of a tree that define the run: all but those of how it is stored, watched and shown."""
    operation = {setting.name for setting in all_settings() if setting.role == "operation"}
    return {name: value for name, value in flatten(tree).items() if name not in operation}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """How the identities of two trees of as_tree differ: "name: value → value" for each setting."""
    old, new = identity(before), identity(after)
    return [
        f"{name}: {old.get(name, 'absent')} → {new.get(name, 'absent')}"
        for name in {**old, **new}
        if old.get(name, ...) != new.get(name, ...)
    ]


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The type of each field of a settings class, which takes long to evaluate."""
    return get_type_hints(kind, include_extras=True)


def _leaves(kind: Any, value: Any = None, prefix: str = "", role: str = "") -> Iterator[Setting]:
    """The fields of a settings class and of those inside it; durations as one, with typed values."""
    hints = _hints(kind)
    for field in fields(kind):
        name = field.metadata.get("name", prefix + field.name)
        if name is None:
            continue
        hint, inner = hints[field.name], getattr(value, field.name, None)
        own_role = field.metadata.get("role", role)
        if is_dataclass(hint) and hint is not Duration:
            yield from _leaves(hint, inner, f"{name}.", own_role)
        else:
            yield Setting(name, hint, own_role, inner)


def _duration(hint: Any) -> DurationHint | None:
    """None: the type is not that of a duration."""
    union = get_origin(hint) in (Union, types.UnionType)
    choices = get_args(hint) if union else (hint,)
    for choice in choices:
        bounded = get_args(choice) if get_origin(choice) is Annotated else (choice,)
        if bounded[0] is Duration:
            number = Annotated[int, bounded[1]] if len(bounded) > 1 else NotNegative
            return DurationHint(number, required=not union)
    return None


def _build(kind: Any, values: FlatSettings, prefix: str = "") -> Any:
    """An instance of a settings class from converted values."""
    hints, built = _hints(kind), {}
    for field in fields(kind):
        hint, name = hints[field.name], field.metadata.get("name", prefix + field.name)
        if name is None:
            continue
        if _duration(hint) is not None:
            steps, tokens = (values[f"{name}.{unit}"] for unit in UNITS)
            built[field.name] = None if steps is None and tokens is None else Duration(steps, tokens)
        else:
            built[field.name] = _build(hint, values, f"{name}.") if is_dataclass(hint) else values[name]
    return kind(**built)


# Settings that may change when a run is resumed.
PLACEMENT = tuple(setting.name for setting in all_settings() if setting.role == "placement")
