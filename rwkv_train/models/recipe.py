"""A generation's recipe: for each parameter its initial value, learning-rate multiplier and weight decay.

Every architecture has one table of `RecipeRow`s. `claim` gives each parameter of a model exactly one row; `initialise`
fills the model from it. An initial value is a function of (seed, parameter name, shape, model shape) and of nothing
else: not of the construction order, the number of threads or of other parameters.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rwkv_train.models.config import ModelConfig


@dataclass(frozen=True)
class Site:
    """The position of a parameter in the model, with the two depth ratios of the RWKV papers.

    Args:
        layer: the layer l, 0 for parameters outside of the blocks.
        n_layer: number of layers L.
        head_size: channels of one head N; None: the architecture has no heads.
    """

    layer: int
    n_layer: int
    head_size: int | None = None

    @property
    def rho0(self) -> float:
        """l / (L - 1): 0 in the first layer, 1 in the last."""
        return self.layer / (self.n_layer - 1) if self.n_layer > 1 else 0.0

    @property
    def rho1(self) -> float:
        """1 - l / L: 1 in the first layer, towards 0 in the last."""
        return 1.0 - self.layer / self.n_layer


Initialiser = Callable[[torch.Size, Site, torch.Generator], Tensor]


@dataclass(frozen=True)
class RecipeRow:
    """One line of a recipe.

    Args:
        names: a regular expression that matches complete parameter names.
        init: (shape, site, generator) → the initial value, float32 or float64, on the CPU.
        lr: multiplier of the learning rate.
        decay: whether weight decay, where it is asked for, applies.
        product: whether every token is multiplied with it as a matrix. Such parameters count as FLOPs and may be
            gathered in the dtype of products; all others stay float32 in the forward pass.
        not_trained: a regular expression that matches those of them that the optimiser does not change: published files
            hold them, and the forward pass does not use them. They are stored as they were initialised or loaded.
    """

    names: str
    init: Initialiser
    lr: float = 1.0
    decay: bool = False
    product: bool = False
    not_trained: str = r"(?!)"  # matches nothing

    def trains(self, name: str) -> bool:
        """Whether the optimiser changes the parameter of that name."""
        return re.fullmatch(self.not_trained, name) is None


def constant(value: float) -> Initialiser:
    return lambda shape, site, generator: torch.full(shape, value)


def uniform(bound: float) -> Initialiser:
    return lambda shape, site, generator: torch.empty(shape).uniform_(-bound, bound, generator=generator)


def curve(formula: Callable[[Tensor, int, Site], Tensor]) -> Initialiser:
    """A value per channel: formula(c, C, site) → (C), with c = 0 … C-1 in float64.

    The channels of a parameter (C), (1, 1, C) or (H, N) are all its elements in row-major order: C = H · N.
    """

    def init(shape: torch.Size, site: Site, generator: torch.Generator) -> Tensor:
        channels = shape.numel()
        return formula(torch.arange(channels, dtype=torch.float64), channels, site).reshape(shape)

    return init


@dataclass(frozen=True)
class Orthogonal:
    """A (rows, columns) matrix with orthogonal rows or columns, times a gain.

    Args:
        scale: the gain, that is the matrix's singular values.
        tall_factor: whether the gain is multiplied by sqrt(rows / columns) where there are more rows than columns.
    """

    scale: float
    tall_factor: bool

    def __call__(self, shape: torch.Size, site: Site, generator: torch.Generator) -> Tensor:
        rows, columns = shape
        gain = self.scale * (math.sqrt(max(1.0, rows / columns)) if self.tall_factor else 1.0)
        values = torch.empty(shape).normal_(generator=generator)
        tall = values if rows >= columns else values.T
        q, r = torch.linalg.qr(tall)
        q *= r.diagonal().sign()
        tall.copy_(q)  # over the draws, which torch.nn.init.orthogonal_ (the same values) keeps: 1 GB for 14B's head
        return values.mul_(gain)

    @staticmethod
    def work(shape: torch.Size) -> int:
        """Multiplications of the orthogonalisation, but for a factor: what takes time when a large model is made."""
        return shape.numel() * min(shape)


def claim(names: Iterable[str], recipe: Sequence[RecipeRow]) -> dict[str, RecipeRow]:
    """Gives each parameter name its row.

    Raises:
        ValueError: a name that no row or more than one row matches, or a row that matches nothing.
    """
    patterns = [re.compile(row.names) for row in recipe]
    claimed: dict[str, RecipeRow] = {}
    used: set[int] = set()
    for name in names:
        found = [i for i, pattern in enumerate(patterns) if pattern.fullmatch(name)]
        if len(found) != 1:
            rows = ", ".join(recipe[i].names for i in found) or "none"
            raise ValueError(
                f"parameter {name} must be claimed by exactly one row of the recipe, but these match: {rows}"
            )
        claimed[name] = recipe[found[0]]
        used.add(found[0])
    if idle := [row.names for i, row in enumerate(recipe) if i not in used]:
        raise ValueError(f"rows of the recipe that match no parameter: {', '.join(idle)}")
    return claimed


def initial_value(name: str, shape: torch.Size, row: RecipeRow, config: ModelConfig, seed: int) -> Tensor:
    """The initial value of one parameter, float32 on the CPU: a pure function of its arguments.

    It is made by one thread, since the orthogonalisation's last bits depend on how many share the work.
    """
    layer = re.match(r"blocks\.(\d+)\.", name)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            site = Site(int(layer[1]) if layer else 0, config.n_layer, config.head_size)
            return row.init(shape, site, generator).float()
    finally:
        torch.set_num_threads(threads)


def initialise(model: nn.Module, recipe: Sequence[RecipeRow], config: ModelConfig, seed: int) -> None:
    """Fills every parameter of the model in place with its initial value."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, row in claim(parameters, recipe).items():
            parameters[name].copy_(initial_value(name, parameters[name].shape, row, config, seed))
