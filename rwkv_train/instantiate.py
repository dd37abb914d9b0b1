"""Others' loggers and callbacks: from a tree with `_target_` to an object, in two steps.

All classes of all trees are found and their arguments bound to the signatures before the first object is made, so that
a mistake in the last of them leaves nothing behind. A checkpoint's config never comes here, the command line's only.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from rwkv_train.errors import UserError, UserErrors

T = TypeVar("T")
Makers = Sequence[Callable[[], T]]  # what is called to make each object
OURS = ("lightning", "rwkv_train")  # packages whose classes may be named without saying so


def prepare(
    name: str, trees: Mapping[str, Any], kind: type[T] | tuple[type, ...], packages: Sequence[str] = ()
) -> list[Callable[[], T]]:
    """What is to be called to make each object of the trees.

    Args:
        name: of the tree as a user types it: logger or callbacks.
        trees: entry → {_target_: PACKAGE.CLASS, argument: value, …}; arguments may be such trees themselves.
        kind: what each of them must be (one of several).
        packages: further packages that may be named (`packages=[…]`).

    Raises:
        UserErrors: classes that are not there, not allowed or not of that kind, and arguments that do not fit.
    """
    made, problems = [], []
    for entry, tree in trees.items():
        where = f"{name}.{entry}"
        try:
            if not isinstance(tree, Mapping) or "_target_" not in tree:
                raise UserError(f"{where} has no _target_", f"+{where}._target_=PACKAGE.CLASS")
            made.append(_bind(where, tree, (*OURS, *packages), kind))
        except UserError as problem:
            problems.append(problem)
    if problems:
        raise UserErrors(problems)
    return made


def _bind(
    where: str, tree: Mapping[str, Any], packages: Sequence[str], kind: type | tuple[type, ...] | None
) -> Callable[[], Any]:
    target = _find(where, str(tree["_target_"]), packages)
    if kind is not None and not (isinstance(target, type) and issubclass(target, kind)):
        wanted = (kind[-1] if isinstance(kind, tuple) else kind).__name__
        raise UserError(f"{where}._target_={tree['_target_']} is no {wanted}", f"name a subclass of {wanted}")
    arguments = {}
    for argument, value in tree.items():
        if argument.startswith("_") and argument != "_target_":
            raise UserError(f"{where}.{argument}: of Hydra's own keys only _target_ is known here", "leave it out")
        if argument != "_target_":
            inner = isinstance(value, Mapping) and "_target_" in value
            arguments[argument] = _bind(f"{where}.{argument}", value, packages, None) if inner else value
    signature = inspect.signature(target)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        known = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        near = [close for word in arguments if word not in known for close in difflib.get_close_matches(word, known, 1)]
        way_out = (f"nearest: {', '.join(near)}; " if near else "") + f"valid: {', '.join(known) or 'none'}"
        raise UserError(f"{where}: {tree['_target_']} {error}", way_out) from None
    return partial(_make, target, arguments)


def _make(target: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    return target(**{name: value() if isinstance(value, partial) else value for name, value in arguments.items()})


def _find(where: str, path: str, packages: Sequence[str]) -> Callable[..., Any]:
    """The class or function of that path; it must also be *defined* in one of the packages, not only imported there."""
    allowed = f"valid: something of {', '.join(packages)}; others after packages=[{path.split('.')[0]}]"
    if path.split(".")[0] not in packages:
        raise UserError(f"{where}._target_={path}: {path.split('.')[0]} is no package that may be named here", allowed)
    module, _, name = path.rpartition(".")
    try:
        home = importlib.import_module(module or path)
    except ImportError as error:
        raise UserError(
            f"{where}._target_={path} cannot be imported: {error}", "check the path, or install it"
        ) from None
    target = getattr(home, name, None)
    if target is None:
        near = difflib.get_close_matches(name, dir(home), 1)
        raise UserError(
            f"{where}._target_={path}: {module} has no {name}", f"nearest: {module}.{near[0]}" if near else ""
        )
    if not (inspect.isclass(target) or inspect.isfunction(target)):
        raise UserError(f"{where}._target_={path} is neither a class nor a function", "name a class")
    if target.__module__.split(".")[0] not in packages:
        raise UserError(
            f"{where}._target_={path} is defined in {target.__module__}, not in an allowed package", allowed
        )
    found: Callable[..., Any] = target
    return found
