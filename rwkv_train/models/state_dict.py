"""The parameters in what a file of weights holds: below keys, and with prefixes that wrappers add. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_WRAPPERS = r"_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_PREFIX = re.compile(rf"^(?:(?:module|model|{_WRAPPERS})\.)+|(?<=\.)(?:(?:{_WRAPPERS})\.)+")
_KNOWN = "emb.weight"  # every model under the field's names has it
_MAX_DEPTH = 3  # of dicts in dicts


class AmbiguousWeights(ValueError):
    """A file holds the parameters of several models, or one under two names."""


def unwrapped(content: Any, is_tensor: Callable[[Any], bool]) -> tuple[Any, str]:
    """The parameters of a state dict under the field's names.

    They may be in a dict below a key ("state_dict", "model", …), and their names may have the prefixes of DDP,
    DeepSpeed, FSDP, torch.compile and of modules named `model`.

    Args:
        content: of the file.
        is_tensor: whether a value is a tensor.

    Returns:
        the parameters, and what was removed, for a line of output (empty: nothing). A content without a model is
        returned as it is.

    Raises:
        AmbiguousWeights: there are several models, or two names become one.
    """
    found = list(_models(content, is_tensor, ()))
    if len(found) > 1:
        names = " and ".join(".".join(path) or "the file itself" for path, _ in found[:2])
        raise AmbiguousWeights(f"it holds several models: {names}")
    if not found:
        return content, ""
    path, held = found[0]
    plain: dict[str, Any] = {}
    prefixes: dict[str, None] = {}
    for name, value in held.items():
        short = _plain(name)
        if short in plain:
            raise AmbiguousWeights(f"it holds {short} twice, also as {name}")
        prefixes.update(dict.fromkeys(match[0] for match in _PREFIX.finditer(str(name))))
        plain[short] = value
    removed = [f"the weights are below {'.'.join(path)}"] if path else []
    removed += [f"names without {', '.join(prefixes)}"] if prefixes else []
    return plain, "; ".join(removed)


def _models(
    content: Any, is_tensor: Callable[[Any], bool], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if not isinstance(content, Mapping):
        return
    if any(_plain(name) == _KNOWN and is_tensor(value) for name, value in content.items()):
        yield path, content
    if len(path) < _MAX_DEPTH:
        for key, value in content.items():
            yield from _models(value, is_tensor, (*path, str(key)))


def _plain(name: Any) -> Any:
    return _PREFIX.sub("", name) if isinstance(name, str) else name
