"""Values for settings that are left open: from the published configuration of a size, or from the initial weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rwkv_train.checkpoint.name import find_weights
from rwkv_train.cli.compose import Composed, settle_durations
from rwkv_train.cli.conf_folders import ConfFolders
from rwkv_train.config.schema import FlatSettings, schema
from rwkv_train.config.suggestions import suggestion
from rwkv_train.config.values import convert
from rwkv_train.errors import UserError, UserErrors
from rwkv_train.models.config import ModelConfig
from rwkv_train.models.detect import detect_file
from rwkv_train.models.registry import ARCHITECTURES
from rwkv_train.user_path import user_path

SECTIONS = ("model", "optim", "batch")  # a row of conf/model may hold any setting of these, without the section's name
SHAPE_SETTINGS = ("n_layer", "n_embd", "dim_ffn", "vocab_size", "head_size", "extra")  # what is read from weights
DEFAULT_BATCH = {"batch.tokens": 1024, "batch.context": 256}  # for sizes that were published without a batch


def weights_config(settings: FlatSettings) -> ModelConfig | None:
    """Architecture and shape of init.weights; None: not set, or no such file (checks.py reports that).

    Raises:
        UserError: the weights cannot be read, or are of an architecture that cannot be trained.
    """
    path = settings.get("init.weights")
    return None if path is None else detect_file(find_weights(user_path(str(path))))


def fill_open_settings(
    composed: Composed, conf: ConfFolders, weights: ModelConfig | None, typed: Collection[str], size_typed: bool
) -> list[UserError]:
    """Fills settings from the row of (size, arch) in conf/model, and the shape from init.weights.

    A value of the row is taken where none is set, or where only conf/optim, conf/arch or train.yaml set one.

    A null that was typed for a setting that accepts it (optim.clip=null: no clipping) stays.

    Args:
        composed: its settings are changed in place.
        conf: the conf folders.
        weights: architecture and shape of init.weights; None: there are none.
        typed: names of the settings on the command line.
        size_typed: whether `model=` was typed. If not, init.weights decides about the size.

    Returns:
        contradictions between what was typed and the weights, and settings that nothing gives a value.

    Raises:
        UserError: a row of conf/model holds an unknown setting.
    """
    problems: list[UserError] = []
    settings, published = composed.settings, _published(conf)
    row = published.get(settings["model.size"], {}).get(settings["arch"], {})
    if weights is not None and weights.arch != settings["arch"]:
        what = f"arch={settings['arch']}, but init.weights={settings['init.weights']} is {weights.arch}"
        problems.append(UserError(what, "leave the arch out: it is read from the weights"))
    elif weights is not None:
        problems += _contradictions(settings, weights, row if size_typed else {})
        if not size_typed:
            settings["model.size"], row = _size_of(weights, published)
        held = {f"model.{key}": value for key in SHAPE_SETTINGS if (value := getattr(weights, key)) is not None}
        extra = settings.get("model.extra")  # may hold widths that the architecture does not know
        settings.update({**held, "model.extra": {**(extra if isinstance(extra, dict) else {}), **weights.extra}})
        settings["model.vocab_size"] += len(settings.get("vocab.extend") or ())
    known = schema()
    for name, value in {**DEFAULT_BATCH, **row}.items():
        if name == "model.extra":
            settings[name] = {**value, **(settings.get(name) or {})}
        elif name in typed and settings.get(name) is None and _accepts_null(known[name]):
            continue
        elif settings.get(name) is None or (name in row and not any(name in source for source in composed.sources)):
            settings[name] = value
    _learning_rate_by_rule(settings)
    settle_durations(settings, [conf.read("arch", settings["arch"]), row, *composed.sources])
    return problems + _unknown_widths(settings) + _fill_missing(settings, published)


def _learning_rate_by_rule(settings: FlatSettings) -> None:
    """Fills the learning rates by the architecture's rule where none are published or typed."""
    entry, channels = ARCHITECTURES.get(settings["arch"]), settings.get("model.n_embd")
    if entry is not None and entry.learning_rate is not None and type(channels) is int and channels > 0:
        for name, value in zip(("optim.lr", "optim.final_lr"), entry.learning_rate(channels), strict=True):
            if settings.get(name) is None:
                settings[name] = value


def _unknown_widths(settings: FlatSettings) -> list[UserError]:
    """Settings of the shape that the architecture does not know."""
    arch, extra = settings["arch"], settings.get("model.extra")
    if arch not in ARCHITECTURES:
        return []
    known = ARCHITECTURES[arch].settings
    given = {"head_size": settings.get("model.head_size"), **(extra if isinstance(extra, dict) else {})}
    return [
        UserError(
            f"model.{key if key == 'head_size' else f'extra.{key}'}={value}: arch={arch} has no such width",
            f"valid: {', '.join(sorted(known))}" if known else f"leave it out: arch={arch} has none of them",
        )
        for key, value in given.items()
        if value is not None and key not in known
    ]


def _published(conf: ConfFolders) -> dict[str, dict[str, FlatSettings]]:
    """Size → arch → full name of the setting → value."""
    return {
        size: {arch: _with_sections(f"conf/model/{size}.yaml: published.{arch}", row) for arch, row in rows.items()}
        for size, rows in conf.published.items()
    }


def _with_sections(where: str, row: Mapping[str, Any]) -> FlatSettings:
    """{"n_layer": 4, "lr": 1e-3} → {"model.n_layer": 4, "optim.lr": 1e-3}."""
    known = schema()
    full: FlatSettings = {}
    for key, value in row.items():
        if key.startswith("extra."):
            full.setdefault("model.extra", {})[key.partition(".")[2]] = value
            continue
        name = next((f"{section}.{key}" for section in SECTIONS if f"{section}.{key}" in known), None)
        if name is None:
            valid = [name.partition(".")[2] for name in known if name.startswith(tuple(f"{s}." for s in SECTIONS))]
            raise UserErrors([UserError(f"{where}.{key}: there is no such setting", suggestion(key, valid))])
        full[name] = value
    return full


def _contradictions(settings: FlatSettings, weights: ModelConfig, row: FlatSettings) -> list[UserError]:
    """Where a shape that was asked for is not that of the weights."""
    problems = []
    found, asked = _widths({f"model.{key}": getattr(weights, key) for key in SHAPE_SETTINGS}), _widths(settings)
    for name, value in {**_widths(row), **asked}.items():
        if name in found and str(value) != str(found[name]):
            problems.append(
                UserError(
                    f"{name}={value}, but init.weights={settings['init.weights']} has {found[name]}",
                    "leave the shape out: it is read from the weights",
                )
            )
    return problems


def _widths(settings: FlatSettings) -> FlatSettings:
    """The settings of the shape that are given, each width of `model.extra` by its full name."""
    given = {f"model.{key}": settings.get(f"model.{key}") for key in SHAPE_SETTINGS if key != "extra"}
    extra = settings.get("model.extra")
    given |= {f"model.extra.{key}": value for key, value in (extra if isinstance(extra, dict) else {}).items()}
    return {name: value for name, value in given.items() if value is not None}


def _size_of(weights: ModelConfig, published: Mapping[str, Mapping[str, FlatSettings]]) -> tuple[str, FlatSettings]:
    """The published size with that shape and its row; otherwise a name made of the shape, and an empty row."""
    for size, rows in published.items():
        row = rows.get(weights.arch, {})
        if (row.get("model.n_layer"), row.get("model.n_embd")) == (weights.n_layer, weights.n_embd):
            return size, row
    return f"L{weights.n_layer}C{weights.n_embd}", {}


def _fill_missing(settings: FlatSettings, published: Mapping[str, Mapping[str, FlatSettings]]) -> list[UserError]:
    """The error for settings without a value; they get one, so that the others can be checked too."""
    rows = [row for by_arch in published.values() for row in by_arch.values()]
    known = schema()
    missing = [
        name
        for name in known
        if settings.get(name) is None and any(name in row for row in rows) and not _accepts_null(known[name])
    ]
    if not missing:
        return []
    for name in missing:
        settings[name] = next(row[name] for row in rows if name in row)
    table = "; ".join(f"{size}: {', '.join(by_arch)}" for size, by_arch in published.items())
    return [
        UserError(
            f"no published configuration for model={settings['model.size']} arch={settings['arch']} "
            f"(published: {table})",
            f"give it by hand: {' '.join(f'{name}=…' for name in missing)}",
        )
    ]


def _accepts_null(hint: Any) -> bool:
    try:
        convert(hint, None)
    except ValueError:
        return False
    return True
