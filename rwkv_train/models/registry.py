"""The architectures that can be trained, and what is known of each without importing torch.

An architecture's code is one module (rwkv4.py …) with an `ARCHITECTURE`; it is imported when a model is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, cast

from rwkv_train.models.config import ModelConfig

if TYPE_CHECKING:
    from rwkv_train.models.architecture import Architecture

Shapes = Mapping[str, tuple[int, ...]]  # parameter name → shape


@dataclass(frozen=True)
class LayerChart:
    """How a per-layer value of metrics.jsonl is shown.

    Args:
        title: the chart's title.
        unit: of the value; empty where it has none.
        description: one phrase, as docs/metrics.md has it.
        quantiles: names of the numbers where a layer's value is a list of several; five of them, from minimum to
            maximum, are drawn as a band.
    """

    title: str
    unit: str
    description: str
    quantiles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Registration:
    """An architecture's entry.

    Args:
        module: full name of the module that holds `ARCHITECTURE`.
        recognise: the shapes of a file's tensors → the model's shape; None: the file is of another architecture. A
            KeyError, IndexError or ValueError counts as None.
        settings: which of "head_size" and the names of `ModelConfig.extra` the architecture knows.
        charts: of the per-layer values that only some architectures have, by key of metrics.jsonl.
        learning_rate: n_embd → first and final learning rate where none was published; None: they must be given.
    """

    module: str
    recognise: Callable[[Shapes], ModelConfig | None]
    settings: frozenset[str] = frozenset()
    charts: Mapping[str, LayerChart] = field(default_factory=dict)
    learning_rate: Callable[[int], tuple[float, float]] | None = None


def architecture(name: str) -> Architecture:
    """The code of an architecture; imports torch.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"arch is {name!r}; valid: {', '.join(ARCHITECTURES)}")
    return cast("Architecture", import_module(ARCHITECTURES[name].module).ARCHITECTURE)


def unknown_settings(config: ModelConfig) -> list[str]:
    """The settings of a config that its architecture does not know: "head_size", or names of `extra`."""
    given = [*config.extra, *(["head_size"] if config.head_size is not None else [])]
    return [name for name in given if name not in ARCHITECTURES[config.arch].settings]


def layer_charts() -> dict[str, LayerChart]:
    """The charts of all architectures, by key."""
    return {key: chart for entry in ARCHITECTURES.values() for key, chart in entry.charts.items()}


def common_shape(arch: str, shapes: Shapes) -> ModelConfig:
    """The shape of a model whose blocks are named as RWKV's: emb.weight (V, C), blocks.L.ffn.key.weight (F, C).

    Raises:
        KeyError, ValueError: the file has no such tensors.
    """
    vocab_size, channels = shapes["emb.weight"]
    width, _ = shapes["blocks.0.ffn.key.weight"]
    layers = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    return ModelConfig(arch, max(layers) + 1, channels, vocab_size, width)


def _rwkv4(shapes: Shapes) -> ModelConfig | None:
    found = common_shape("rwkv4", shapes)
    # RWKV-5.0 has a time_first too, with one number for each head, and a group norm
    sizes = [shapes[f"blocks.0.att.time_{name}"] for name in ("first", "decay")]
    vectors = all(math.prod(size) == max(size) == found.n_embd for size in sizes)
    return found if vectors and "blocks.0.att.ln_x.weight" not in shapes else None


_RELEASED_HEAD_SIZE = 64  # of every released RWKV-7


def _rwkv7(shapes: Shapes) -> ModelConfig:
    found = common_shape("rwkv7", shapes)
    heads = _without_ones(shapes["blocks.0.att.r_k"])  # (H, N), or a vector, which does not show N
    ranks = {
        "decay_low_rank_dim": shapes["blocks.0.att.w1"],
        "a_low_rank_dim": shapes["blocks.0.att.a1"],
        "gate_low_rank_dim": shapes["blocks.0.att.g1"],
    }
    for layer in (1, 0):  # some files lack v1 of the first layer, which does not use it
        if f"blocks.{layer}.att.v1" in shapes:
            ranks["v_low_rank_dim"] = shapes[f"blocks.{layer}.att.v1"]
    extra = {name: rank for name, shape in ranks.items() for _, rank in [_without_ones(shape)]}
    return replace(found, head_size=heads[1] if len(heads) == 2 else _RELEASED_HEAD_SIZE, extra=extra)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without dimensions of 1, unless it is that of a matrix."""
    return shape if len(shape) == 2 else tuple(size for size in shape if size != 1)


def learning_rate_note(config: ModelConfig, lr: float, final_lr: float) -> str | None:
    """A line where the learning rates are those of the architecture's rule, since none were published; else None."""
    rule = ARCHITECTURES[config.arch].learning_rate
    if rule is None or rule(config.n_embd) != (lr, final_lr):
        return None
    return f"lr      {lr:.3g} → {final_lr:.3g} by the community's rule 0.45/C → 0.04/C; none was published"


def community_rule(n_embd: int) -> tuple[float, float]:
    """First and final learning rate by the rule that RWKV's users go by: 0.45/C → 0.04/C."""
    return 0.45 / n_embd, 0.04 / n_embd


STATE_RMS = LayerChart(
    "RMS of the state", "", "root mean square of the state's content after the last token of the context"
)
HALF_LIFE = LayerChart(
    "Time decay",
    "half-life (tokens)",
    "half-lives of the channels: [minimum, 10 %, median, 90 %, maximum]",
    ("minimum", "p10", "median", "p90", "maximum"),
)

ARCHITECTURES: dict[str, Registration] = {
    "rwkv4": Registration(
        "rwkv_train.models.rwkv4",
        _rwkv4,
        charts={
            "layers/state_rms": STATE_RMS,
            "layers/receptance_saturated": LayerChart(
                "Saturated receptance gates",
                "share",
                "share of the time-mix gates below 0.02 or above 0.98",
            ),
            "decay/half_life": HALF_LIFE,
        },
    ),
    "rwkv7": Registration(
        "rwkv_train.models.rwkv7",
        _rwkv7,
        settings=frozenset(
            {"head_size", "decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim"}
        ),
        charts={"layers/state_rms": STATE_RMS, "decay/half_life": HALF_LIFE},
        learning_rate=community_rule,
    ),
}
