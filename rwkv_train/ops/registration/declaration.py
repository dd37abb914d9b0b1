"""How an operator is declared in torch.library, without any C++: schema, fake kernel and autograd.

An engine registers implementations for its device when its library is loaded. Until then a call reaches the kernel
that is registered here for every device: it loads the engine of the operator's family and calls again, or runs the
definition where there is no engine. So the same graph, compiled or not, runs with any engine, and nothing is built
while torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv_train.ops.families import FAMILIES

NAMESPACE = "rwkv_train"

KERNELS: dict[str, dict[str, Callable[..., Any]]] = {}  # by family and operator: what runs until an engine is loaded

_library = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class SelfTestCase:
    """Inputs on which an operator of an engine is compared with its definition in float64.

    Attributes:
        name: of the operator and the variant, as "wkv4 with starts".
        inputs: makes the differentiable inputs by name, in float64 and on the CPU.
        stored: names of the inputs that are in the storage dtype under test; the others are float32.
        outputs: a name for each result.
        definition: (starts, *inputs) → results, for inputs in any floating dtype.
        operator: the same by torch.ops.rwkv_train, on any device.
        starts: makes (B, T) bool, where documents begin; None: the operator is called with None.
        device: type of the only device that has the operator; None: every device.
    """

    name: str
    inputs: Callable[[], dict[str, Tensor]]
    stored: tuple[str, ...]
    outputs: tuple[str, ...]
    definition: Callable[..., Sequence[Tensor]]
    operator: Callable[..., Sequence[Tensor]]
    starts: Callable[[], Tensor] | None = None
    device: str | None = None


def define(schema: str) -> None:
    """Declares an operator that only an engine implements: calls of another operator's kernel reach it."""
    _library.define(schema)


def declare(
    family: str,
    schema: str,
    definition: Callable[..., Any],
    fake: Callable[..., Any],
    on_cuda: Callable[..., Any] | None = None,
) -> None:
    """Declares an operator of a family.

    Args:
        family: key of FAMILIES.
        schema: name, arguments and results, as torch.library has them; the first Tensor's device decides the engine.
        definition: runs where no engine is available; takes the arguments of the schema.
        fake: the results' shapes and dtypes for the arguments of the schema.
        on_cuda: runs on a GPU once the CUDA engine is loaded; None: that engine registers the operator itself.
    """
    name = schema.split("(")[0]

    def kernel(*arguments: Any) -> Any:
        device = next(argument for argument in arguments if isinstance(argument, Tensor)).device.type
        engine = FAMILIES[family].engine(device)
        if engine is None or not engine.load():
            return definition(*arguments)
        if device == "cuda" and on_cuda is not None:
            return on_cuda(*arguments)
        return getattr(torch.ops.rwkv_train, name)(*arguments)

    KERNELS.setdefault(family, {})[name] = kernel
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def differentiate(name: str, setup: Callable[..., None], gradient: Callable[..., Any]) -> None:
    """Gives an operator its gradient, and its backward operator an error for second derivatives.

    Args:
        name: of the operator; `<name>_backward` is the operator that `gradient` calls.
        setup: (ctx, inputs, output) saves what the gradient needs.
        gradient: (ctx, *gradients of the outputs) → gradients of the inputs.
    """

    def no_second_derivative(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"{name} has no second derivative in its engines; RWKV_OPS=reference has it")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", gradient, setup_context=setup, lib=_library)
    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", no_second_derivative, lib=_library)
