"""From the words that a user types to a typed Config, and back.

A word is what stands before the `=`, such as `model.n_layer`. Each setting has one, its own path unless its metadata
say otherwise; a Duration has two (`….steps`, `….tokens`), of which at most one is set.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from rwkv_train.config.settings import Config, Duration, NotNegative
from rwkv_train.errors import UserError, UserErrors

Words = dict[str, Any]  # word → value; a list of settings stays a list, logger and callbacks stay trees

OPEN = ("logger", "callbacks", "launcher")  # the trees that a user may add to: others' classes have others' arguments
DURATIONS = (
    "budget",
    "checkpoint.every",
    "checkpoint.permanent",
    "validation.every",
    "statistics.every",
    "optim.schedule.warmup",
    "optim.schedule.hold",
)

# Where and how a run is computed, not what: a run may go on with others of these.
PLACEMENT = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "strategy",
    "deepspeed",
    "batch.micro",
    "threads",
    "activation_checkpointing",
    "checkpoint.every.steps",
    "checkpoint.every.tokens",
    "checkpoint.keep",
    "checkpoint.permanent.steps",
    "checkpoint.permanent.tokens",
    "checkpoint.best",
    "checkpoint.background",
)

# What users of Lightning and of its template look for, and where it is here.
ELSEWHERE = {
    "ckpt_path": "resume",
    "trainer.accumulate_grad_batches": "batch.micro (accumulation is derived from batch.tokens)",
    "trainer.gradient_clip_val": "optim.clip",
    "trainer.max_epochs": "budget.steps or budget.tokens",
    "trainer.max_steps": "budget.steps",
    "trainer.strategy": "strategy",
    "trainer.val_check_interval": "validation.every.steps",
}


def parse_count(value: int | float | str) -> int:
    """A whole number as people write it: 2000, 1e9, 332e9, 10k, 1.5M, 300B, 1T (k, M, B, T are powers of 1000).

    Raises:
        ValueError: it is no whole number, or one beyond 1e18.
    """
    text = str(value).strip()
    factor = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:], 1)
    try:
        exact = Decimal(value) if isinstance(value, float) else Decimal(text[:-1] if factor > 1 else text) * factor
    except ArithmeticError:  # no number, or one that overflows even here
        raise ValueError(f"{value!r} is no number") from None
    if not exact.is_finite() or abs(exact) > 10**18 or exact != exact.to_integral_value():
        raise ValueError(f"{value!r} is no whole number up to 1e18")
    return int(exact)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Words:
    """{"model": {"n_layer": 4}} → {"model.n_layer": 4}. The trees of OPEN, lists and empty trees stay as they are."""
    words: Words = {}
    for key, value in tree.items():
        word = f"{prefix}{key}"
        inner = isinstance(value, Mapping) and value and word not in OPEN
        words.update(flatten(value, f"{word}.") if inner else {word: value})
    return words


def as_tree(config: Config) -> dict[str, Any]:
    """A config as nested dicts, lists and plain values under the words: what config.yaml and checkpoints hold."""
    tree: dict[str, Any] = {}
    for word, _, value in _walk(Config, config):
        *path, last = word.split(".")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = value
    return tree


def from_tree(tree: Mapping[str, Any]) -> Config:
    """The inverse of as_tree.

    Raises:
        UserErrors: all unknown words, missing words, wrong types and values out of bounds.
    """
    config, problems = read(flatten(tree))
    if config is None or problems:
        raise UserErrors(problems)
    return config


def identity(tree: Mapping[str, Any]) -> Words:
    """The words that make a run what it is: not where it lies, what watches it, and what is done when it fails."""
    others = ("resume", "logger", "launcher", "dry_run", "device", "mfu", "profile", "replay")
    groups = ("run.", "cluster.", "watchdog.", "statistics.", "health.")
    return {w: v for w, v in flatten(tree).items() if not w.startswith(groups) and w not in others}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """How the identities of two trees of as_tree differ: "word: value → value" for each word."""
    old, new = identity(before), identity(after)
    return [
        f"{word}: {old.get(word, 'absent')} → {new.get(word, 'absent')}"
        for word in {**old, **new}
        if old.get(word, ...) != new.get(word, ...)
    ]


def schema() -> dict[str, Any]:
    """Every word and its type."""
    return {word: hint for word, hint, _ in _walk(Config)}


def read(words: Words) -> tuple[Config | None, list[UserError]]:
    """The typed config (None where a value cannot be read), and everything that is wrong with single words."""
    problems, known = [], schema()
    values: Words = {}
    for word, hint in known.items():
        try:
            values[word] = _convert(hint, words[word])
        except KeyError:
            problems.append(UserError(f"{word} is missing", f"valid: {describe(hint)}"))
        except ValueError:
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            near = nearest(str(words[word]), choices)
            hint_text = f"valid: {describe(hint)}" + (f"; nearest: {near}" if near else "")
            problems.append(UserError(f"{word}={show(words[word])} is not valid", hint_text))
    config = _build(Config, values) if not problems else None
    for span in DURATIONS:
        steps, tokens = (values.get(f"{span}.{unit}") for unit in ("steps", "tokens"))
        if steps is not None and tokens is not None:
            what = f"{span}.steps={steps} and {span}.tokens={tokens} exclude each other"
            problems.append(UserError(what, "give one of them"))
        elif steps is None and tokens is None and span not in ("budget", "checkpoint.permanent"):
            problems.append(UserError(f"{span} is not given", f"{span}.steps=… or {span}.tokens=…"))
    problems += [unknown(word, words[word], [*known, *OPEN]) for word in words if word not in known]
    return config, problems


def unknown(word: str, value: Any, known: Sequence[str]) -> UserError:
    """The message for a word that nobody knows."""
    if any(other.startswith(f"{word}.") for other in known):
        inside = ", ".join(other for other in known if other.startswith(f"{word}."))
        return UserError(f"{word}={show(value)}: {word} is a group of settings", f"valid: {inside}")
    groups = {other.split(".")[0] for other in known} | {"experiment", "debug"}
    near = ELSEWHERE.get(word) or nearest(word, [*known, *sorted(groups)])
    section = [k for k in known if k.startswith(f"{word.split('.')[0]}.") and k != "model.size"]
    valid = f"valid: {', '.join(section)}" if section else "`python train.py --help` lists all"
    return UserError(f"{word}={show(value)}: there is no {word}", f"nearest: {near}; {valid}" if near else valid)


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The most similar of the known words; one with the same last part, whatever stands before it, comes first."""
    last = word.rsplit(".")[-1]
    same = [other for other in known if other.rsplit(".")[-1] == last]
    close = difflib.get_close_matches(word, same or known, 1, 0.0 if same else 0.6)
    if not close:
        by_last = {other.rsplit(".")[-1]: other for other in known}
        close = [by_last[other] for other in difflib.get_close_matches(last, by_last, 1, 0.75)]
    return close[0] if close else None


def show(value: Any) -> str:
    """A value as a user would type it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def describe(hint: Any) -> str:
    """What a type takes, for people."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{describe(arguments[0])} {arguments[1].valid}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return (
            f"a list of {describe(arguments[0])}"
            if arguments[-1] is ...
            else f"[{', '.join(map(describe, arguments))}]"
        )
    if is_dataclass(hint):
        return f"{{{', '.join(f.name for f in fields(hint))}}}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, "name: {_target_: …}")


def _walk(kind: Any, value: Any = None, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(word, type, plain value) of every setting; the values are those of `value`, an instance of `kind`, if given."""
    hints = get_type_hints(kind, include_extras=True)
    for setting in fields(kind):
        hint, inner = hints[setting.name], getattr(value, setting.name, None)
        word = setting.metadata.get("word", prefix + setting.name)
        if word is None:
            continue
        if hint in (Duration, Duration | None):
            for unit in ("steps", "tokens"):
                yield f"{word}.{unit}", NotNegative | None, getattr(inner, unit, None)
        elif is_dataclass(hint):
            yield from _walk(hint, inner, f"{word}.")
        else:
            yield word, hint, _plain(inner)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _build(kind: Any, values: Words, prefix: str = "") -> Any:
    """An instance of a settings class from converted values."""
    hints, built = get_type_hints(kind, include_extras=True), {}
    for setting in fields(kind):
        hint, word = hints[setting.name], setting.metadata.get("word", prefix + setting.name)
        if word is None:
            continue
        if hint in (Duration, Duration | None):
            span = Duration(values[f"{word}.steps"], values[f"{word}.tokens"])
            built[setting.name] = span if span != Duration() else None
        else:
            built[setting.name] = _build(hint, values, f"{word}.") if is_dataclass(hint) else values[word]
    return kind(**built)


def _convert(hint: Any, value: Any) -> Any:
    """A plain value as the type.

    Raises:
        ValueError: it is not of that type, or out of its bounds.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = _convert(arguments[0], value)
        if not arguments[1].holds(number):
            raise ValueError
        return number
    if origin in (Union, types.UnionType):
        for argument in arguments:
            try:
                return _convert(argument, value)
            except ValueError:
                continue
    elif origin is Literal and value in arguments:
        return value
    elif origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        return tuple(_convert(kind, one) for kind, one in zip(kinds, value, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    elif is_dataclass(hint) and isinstance(value, Mapping):
        hints = get_type_hints(hint, include_extras=True)
        if set(value) <= set(hints):
            return _build(hint, {name: _convert(hints[name], value.get(name)) for name in hints})
    elif hint is type(None) and value is None:
        return None
    elif hint is bool and isinstance(value, bool):
        return value
    elif hint is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    elif hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = parse_count(value) if hint is int else float(value)
        if math.isfinite(number):
            return number
    raise ValueError
