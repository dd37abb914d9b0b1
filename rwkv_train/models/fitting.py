"""Files of others, fitted to our model: they leave out tensors that nothing uses, and have vectors of other shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.errors import UserError
from rwkv_train.models.build import build_model, recipe_of
from rwkv_train.models.detect import detect
from rwkv_train.models.recipe import initial_value

SEED = 0  # of the values that are filled in: the same for every use of a file


class Fitted(NamedTuple):
    """What a file of weights becomes.

    Attributes:
        shapes: of all tensors: the model's where the file's has the same elements in the same order, else the file's.
        filled: the tensors that the file lacks and no forward pass uses, with the recipe's initial values.
        note: what was filled in, for a line of output; empty: nothing.
    """

    shapes: dict[str, tuple[int, ...]]
    filled: dict[str, Tensor]
    note: str


def fit(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, what: str) -> Fitted:
    """Fits the tensors of a file to the model that they belong to.

    Published RWKV-7 files have v0, v1 and v2 of the first layer, which does not use them; other files do not.

    Args:
        shapes: of the file's tensors, by the field's names.
        dtype: of the tensors that are filled in.
        what: the file, for messages.

    Returns:
        the tensors of the model in its order, then those that it does not have. A file of no architecture that is known
        here is left as it is.

    Raises:
        UserError: there is no model of its shape.
    """
    try:
        config = detect(shapes, what)
    except UserError:
        return Fitted(dict(shapes), {}, "")
    try:
        model = build_model(config, device="meta")
    except ValueError as error:
        raise UserError(f"{what} holds no model that can be built: {error}", "give another file") from None
    rows = recipe_of(model)
    fitted: dict[str, tuple[int, ...]] = {}
    filled: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        wanted = tuple(parameter.shape)
        if name in shapes:
            fitted[name] = wanted if _same_elements(shapes[name], wanted) else shapes[name]
        elif not rows[name].trains(name):
            fitted[name] = wanted
            filled[name] = initial_value(name, parameter.shape, rows[name], model.config, SEED).to(dtype)
    note = f"{', '.join(filled)} are not in it, and nothing uses them: they get their initial values" if filled else ""
    return Fitted({**fitted, **{name: shape for name, shape in shapes.items() if name not in fitted}}, filled, note)


def _same_elements(found: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a reshape gives the wanted tensor: the same dimensions but for those of 1, or one of the two a vector."""
    dimensions = [[size for size in shape if size != 1] for shape in (found, wanted)]
    return math.prod(found) == math.prod(wanted) and (dimensions[0] == dimensions[1] or min(map(len, dimensions)) < 2)
