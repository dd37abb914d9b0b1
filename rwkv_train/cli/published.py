"""Values for settings that are left open: from the published configuration of a size, or from the initial weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rwkv_train.cli.conf_folders import ConfFolders
from rwkv_train.config.schema import FlatSettings, schema
from rwkv_train.config.suggestions import suggestion
from rwkv_train.config.values import convert
from rwkv_train.errors import UserError, UserErrors
from rwkv_train.weights_header import read_shape

SECTIONS = ("model", "optim", "batch")  # a row of conf/model may hold any setting of these, without the section's name
SHAPE = ("n_layer", "n_embd", "dim_ffn", "vocab_size")  # what is read from weights
DEFAULT_BATCH = {"batch.tokens": 1024, "batch.context": 256}  # for sizes that were published without a batch


def fill_open_settings(
    settings: FlatSettings, conf: ConfFolders, typed: Collection[str], size_typed: bool
) -> list[UserError]:
    """Fills settings that are null from the row of (size, arch) in conf/model, or from init.weights.

    A null that was typed for a setting that accepts it (optim.clip=null: no clipping) stays.

    Args:
        settings: all settings by name; changed in place.
        conf: the conf folders.
        typed: names of the settings on the command line.
        size_typed: whether `model=` was typed. If not, init.weights decides about the size.

    Returns:
        contradictions between what was typed and the weights, and settings that nothing gives a value.

    Raises:
        UserError: the weights cannot be read, or a row of conf/model holds an unknown setting.
    """
    problems: list[UserError] = []
    arch, published = settings["arch"], _published(conf)
    row = published.get(settings["model.size"], {}).get(arch, {})
    shape = _shape_of_weights(settings)
    if shape is not None:
        problems += _contradictions(settings, shape, row if size_typed else {})
        if not size_typed:
            settings["model.size"], row = _size_of(arch, shape, published)
        settings.update({f"model.{key}": value for key, value in shape.items()})
        settings["model.vocab_size"] += len(settings.get("vocab.extend") or ())
    known = schema()
    for name, value in {**DEFAULT_BATCH, **row}.items():
        if settings.get(name) is None and not (name in typed and _accepts_null(known[name])):
            settings[name] = value
    return problems + _fill_missing(settings, published)


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
        name = next((f"{section}.{key}" for section in SECTIONS if f"{section}.{key}" in known), None)
        if name is None:
            valid = [name.partition(".")[2] for name in known if name.startswith(tuple(f"{s}." for s in SECTIONS))]
            raise UserErrors([UserError(f"{where}.{key}: there is no such setting", suggestion(key, valid))])
        full[name] = value
    return full


def _shape_of_weights(settings: FlatSettings) -> dict[str, int] | None:
    """The values of SHAPE in init.weights; None: not set, or no such file (checks.py reports that)."""
    path = settings.get("init.weights")
    found = None if path is None else read_shape(Path(str(path)).expanduser())
    return None if found is None else {key: getattr(found, key) for key in SHAPE}


def _contradictions(settings: FlatSettings, shape: Mapping[str, int], row: FlatSettings) -> list[UserError]:
    """Where a shape that was asked for is not that of the weights."""
    problems = []
    for key, value in shape.items():
        name = f"model.{key}"
        asked = settings.get(name)
        asked = row.get(name) if asked is None else asked
        if asked is not None and str(asked) != str(value):
            problems.append(
                UserError(
                    f"{name}={asked}, but init.weights={settings['init.weights']} has {value}",
                    "leave the shape out: it is read from the weights",
                )
            )
    return problems


def _size_of(
    arch: str, shape: Mapping[str, int], published: Mapping[str, Mapping[str, FlatSettings]]
) -> tuple[str, FlatSettings]:
    """The published size with that shape and its row; otherwise a name made of the shape, and an empty row."""
    for size, rows in published.items():
        row = rows.get(arch, {})
        if (row.get("model.n_layer"), row.get("model.n_embd")) == (shape["n_layer"], shape["n_embd"]):
            return size, row
    return f"L{shape['n_layer']}C{shape['n_embd']}", {}


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
