"""Registers engines that are wrong in one result of one operator at a time, and prints which the self-test catches.

`python -m tests.ops.wrong_engines` prints a JSON object: for each error its self-test ratio and the result that has it.
It runs in a process of its own, since the kernels stay registered. They are the definitions with one result changed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from rwkv_train.ops.build import BuildError
from rwkv_train.ops.families import FAMILIES
from rwkv_train.ops.registration.declaration import KERNELS, NAMESPACE
from rwkv_train.ops.selftest import worst_error


@dataclass
class Planted:
    """The error that the kernels have now.

    Attributes:
        operator: whose kernel is wrong; "" for none.
        result: number of the wrong tensor among its results.
        only: "" always, "starts" where documents have boundaries, "bfloat16" in that storage dtype.
        seen: how many results the operator has, once it ran.
    """

    operator: str = ""
    result: int = 0
    only: str = ""
    seen: int = 0


NOW = Planted()


def wrong(name: str, arguments: tuple[Any, ...], results: Any) -> Any:
    """The results of an operator, one of them off by a little where the planted error says so."""
    flat, structure = tree_flatten(results)
    if NOW.operator != name:
        return results
    NOW.seen = len(flat)
    schema = getattr(torch.ops.rwkv_train, name).default._schema
    starts = next((a for a, b in zip(arguments, schema.arguments, strict=True) if b.name == "starts"), None)
    reduced = any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in arguments)
    if {"": True, "starts": starts is not None, "bfloat16": reduced}[NOW.only]:
        flat[NOW.result] = flat[NOW.result] * (1.05 if flat[NOW.result].dtype == torch.bfloat16 else 1.0001)
    return tree_unflatten(flat, structure)


def main() -> None:
    library = torch.library.Library(NAMESPACE, "IMPL")
    found: dict[str, tuple[float, str]] = {}
    for family, kernels in KERNELS.items():
        engine = FAMILIES[family].cpp
        engine.error = BuildError("replaced by kernels in Python", "")  # so that the declared kernels run definitions

        def replace(name: str, kernel: Any) -> None:
            library.impl(name, lambda *arguments: wrong(name, arguments, kernel(*arguments)), "CPU")

        for name, kernel in kernels.items():
            replace(name, kernel)
        NOW.operator = ""
        found[f"{family}: nothing"] = worst_error(engine)
        for name in kernels:
            NOW.operator, NOW.result, NOW.only = name, 0, ""
            while NOW.result == 0 or NOW.result < NOW.seen:
                found[f"{name}: result {NOW.result}"] = worst_error(engine)
                NOW.result += 1
            with_starts = "starts" in str(getattr(torch.ops.rwkv_train, name).default._schema)
            for only in ("bfloat16", *(["starts"] if with_starts else [])):
                NOW.result, NOW.only = 0, only
                found[f"{name}: only {only}"] = worst_error(engine)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
