"""One plain value ↔ the type of its setting: numbers as people write them, bounds, and what a type accepts in words."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


def parse_count(value: int | float | str) -> int:
    """A whole number as people write it: 2000, 1e9, 332e9, 10k, 1.5M, 300B, 1T (k, M, B, T are powers of 1000).

    Raises:
        ValueError: not a whole number, or one beyond 1e18.
    """
    text = str(value).strip()
    factor = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:], 1)
    try:
        exact = Decimal(value) if isinstance(value, float) else Decimal(text[:-1] if factor > 1 else text) * factor
    except ArithmeticError:  # not a number, or one that overflows even here
        raise ValueError(f"{value!r} is not a number") from None
    if not exact.is_finite() or abs(exact) > 10**18 or exact != exact.to_integral_value():
        raise ValueError(f"{value!r} is not a whole number up to 1e18")
    return int(exact)


def convert(hint: Any, value: Any) -> Any:
    """A plain value as the type.

    Raises:
        ValueError: it is not of that type, or out of its bounds.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = convert(arguments[0], value)
        if arguments[1].holds(number):
            return number
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            try:
                return convert(argument, value)
            except ValueError:
                continue
    elif origin is Literal and value in arguments:
        return value
    elif origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        return tuple(convert(kind, one) for kind, one in zip(kinds, value, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        kind = arguments[1]
        return {str(key): one if kind is Any else convert(kind, one) for key, one in value.items()}
    elif is_dataclass(hint) and isinstance(value, Mapping):
        hints = get_type_hints(hint, include_extras=True)
        if set(value) <= set(hints):
            return hint(**{name: convert(kind, value.get(name)) for name, kind in hints.items()})  # type: ignore[operator]
    elif isinstance(hint, type):
        return _convert_scalar(hint, value)
    raise ValueError(f"{value!r} is not valid")


def _convert_scalar(kind: type, value: Any) -> Any:
    is_bool = isinstance(value, bool)
    if kind is type(None) and value is None:
        return None
    if kind is bool and is_bool:
        return value
    if kind is str and isinstance(value, (str, int)) and not is_bool:
        return str(value)
    if kind in (int, float) and isinstance(value, (int, float, str)) and not is_bool:
        number = parse_count(value) if kind is int else float(value)
        if math.isfinite(number):
            return number
    raise ValueError(f"{value!r} is not valid")


def plain(value: Any) -> Any:
    """A value of a setting as YAML and JSON hold it: tuples as lists, dataclasses as dicts."""
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def show(value: Any) -> str:
    """A value as a user would type it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def describe(hint: Any) -> str:
    """The values that a type accepts, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{describe(arguments[0])} {arguments[1].valid}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is dict and arguments[1] is not Any:
        return f"{{name: {describe(arguments[1])}}}"
    if origin is tuple and arguments[-1] is ...:
        return f"a list of {describe(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(describe, arguments))}]"
    if is_dataclass(hint):
        return f"{{{', '.join(f.name for f in fields(hint))}}}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, "name: {_target_: …}")
