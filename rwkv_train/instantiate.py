"""Instantiates loggers and callbacks from trees with `_target_`, in two steps.

All classes are found and their arguments bound to the signatures before the first object is created, so that an error
in the last tree leaves no objects of the others. Only trees of the command line are instantiated, never those of a
checkpoint or of a run directory.

That a class is defined in an allowed package is no protection by itself: lightning has functions that unpickle a file.
Only classes are accepted, each of the kind that the setting or the annotation of the argument names.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rwkv_train.config.suggestions import nearest, suggestion
from rwkv_train.errors import UserError, UserErrors

T = TypeVar("T")
Makers = Sequence[Callable[[], T]]
ALLOWED_PACKAGES = ("lightning", "rwkv_train")  # whose classes may be named without listing them in packages=[…]


def prepare(
    name: str, trees: Mapping[str, Any], kind: type[T] | tuple[type, ...], packages: Sequence[str] = ()
) -> list[Callable[[], T]]:
    """A factory for each object of the trees.

    Args:
        name: the setting that holds the trees: logger or callbacks.
        trees: entry → {_target_: PACKAGE.CLASS, argument: value, …}; an argument may be such a tree itself where its
            annotation names a class, of which the object must be an instance.
        kind: the class that each object must have, or several of which it must have one.
        packages: further allowed packages (`packages=[…]`).

    Raises:
        UserErrors: classes that do not exist, are not allowed or not of that kind, and arguments that do not fit.
    """
    factories, problems = [], []
    for entry, tree in trees.items():
        where = f"{name}.{entry}"
        try:
            if not isinstance(tree, Mapping) or "_target_" not in tree:
                raise UserError(f"{where} has no _target_", f"+{where}._target_=PACKAGE.CLASS")
            factories.append(_bind(where, tree, (*ALLOWED_PACKAGES, *packages), kind))
        except UserError as problem:
            problems.append(problem)
    if problems:
        raise UserErrors(problems)
    return factories


def _bind(
    where: str, tree: Mapping[str, Any], packages: Sequence[str], kind: type | tuple[type, ...]
) -> Callable[[], Any]:
    target = _find(where, str(tree["_target_"]), packages)
    if not _is_subclass(target, kind):
        wanted = (kind[-1] if isinstance(kind, tuple) else kind).__name__
        raise UserError(f"{where}._target_={tree['_target_']} is not a {wanted}", f"name a subclass of {wanted}")
    arguments = {}
    for argument, value in tree.items():
        if argument.startswith("_") and argument != "_target_":
            raise UserError(f"{where}.{argument}: of Hydra's keys only _target_ is supported", "leave it out")
        if argument != "_target_":
            arguments[argument] = value
            if isinstance(value, Mapping) and "_target_" in value:
                inside = f"{where}.{argument}"
                arguments[argument] = _bind(inside, value, packages, _classes_of(inside, target, argument))
    signature = inspect.signature(target)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        known = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        wrong = next((argument for argument in arguments if argument not in known), "")
        raise UserError(f"{where}: {tree['_target_']} {error}", suggestion(wrong, known)) from None
    return partial(_make, target, arguments)


def _classes_of(where: str, target: type, argument: str) -> tuple[type, ...]:
    """The classes that the annotation of an argument names, beside those of plain values.

    Raises:
        UserError: it names none, so that no object may be given.
    """
    try:
        hint = get_type_hints(inspect.unwrap(target.__init__)).get(argument)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):  # a name that is imported for type checkers only
        hint = None
    found = tuple(kind for kind in _alternatives(hint) if isinstance(kind, type) and kind.__module__ != "builtins")
    if not found:
        raise UserError(
            f"{where}._target_: the annotation of {argument} in {target.__name__} names no class",
            f"give {where} a plain value",
        )
    return found


def _alternatives(hint: Any) -> list[Any]:
    """The types in a union, each without its own arguments."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return [kind for one in get_args(hint) for kind in _alternatives(one)]
    if origin is Annotated:
        return _alternatives(get_args(hint)[0])
    return [hint if origin is None else origin]


def _is_subclass(target: type, kind: type | tuple[type, ...]) -> bool:
    try:
        return issubclass(target, kind)
    except TypeError:  # a Protocol that cannot be asked
        return False


def _make(target: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    return target(**{name: value() if isinstance(value, partial) else value for name, value in arguments.items()})


def _find(where: str, path: str, packages: Sequence[str]) -> type:
    """The class at that path; it must be *defined* in one of the packages, not only imported there."""
    package = path.split(".")[0]
    allowed = f"valid: classes of {', '.join(packages)}; packages=[{package}] allows {package}"
    if package not in packages:
        raise UserError(f"{where}._target_={path}: the package {package} is not allowed", allowed)
    module, _, name = path.rpartition(".")
    try:
        imported = importlib.import_module(module or path)
    except ImportError as error:
        raise UserError(
            f"{where}._target_={path} cannot be imported: {error}", "check the path, or install the package"
        ) from None
    target = getattr(imported, name, None)
    if target is None:
        near = nearest(name, dir(imported))
        raise UserError(f"{where}._target_={path}: {module} has no {name}", f"nearest: {module}.{near}" if near else "")
    if not isinstance(target, type):
        raise UserError(f"{where}._target_={path} is not a class", "name a class")
    if target.__module__.split(".")[0] not in packages:
        raise UserError(
            f"{where}._target_={path} is defined in {target.__module__}, not in an allowed package", allowed
        )
    return target
