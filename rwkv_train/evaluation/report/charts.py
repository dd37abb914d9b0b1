"""Which metrics are drawn together, in which order, under which title and unit: docs/metrics.md as charts.

A key that is not known here gets a chart of its own under "Other".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rwkv_train.models.registry import LayerChart, layer_charts


@dataclass(frozen=True)
class Chart:
    """A chart of one key, or of several of one unit.

    Attributes:
        lines: what each key is called in the chart, by key.
        log: whether the values are best seen on a logarithmic scale.
    """

    section: str
    title: str
    unit: str
    lines: dict[str, str] = field(default_factory=dict)
    log: bool = False


KNOWN = (
    Chart("Loss", "Loss", "nats/token", {"train/loss": "training", "val/loss": "validation"}),
    Chart("Loss", "Bits per byte", "bits/byte", {"train/bits_per_byte": "training", "val/bits_per_byte": "validation"}),
    Chart("Loss", "Validation perplexity", "", {"val/perplexity": "validation"}, log=True),
    Chart("Optimisation", "Learning rate", "", {"lr": "learning rate"}),
    Chart("Optimisation", "Gradient norm", "", {"grad_norm": "before clipping"}, log=True),
    Chart("Optimisation", "Gradient norm after clipping", "", {"grad_norm_clipped": "after clipping"}, log=True),
    Chart("Optimisation", "Share of clipped steps", "share", {"clip_share": "of the last 100 steps"}),
    Chart("Optimisation", "Update-to-weight ratio", "", {"update_ratio": "update / weights"}, log=True),
    Chart("Optimisation", "Skipped steps", "steps", {"skipped": "so far"}),
    Chart("Speed", "Throughput", "tokens/s", {"tokens_per_second": "tokens per second"}),
    Chart("Speed", "Model FLOPs utilisation", "share", {"mfu": "MFU"}),
    Chart("Speed", "Goodput", "share", {"goodput": "time in steps that count"}),
    Chart("Speed", "Time of a step", "s", {"seconds": "whole step"}),
    Chart(
        "Speed",
        "Where a step's time goes",
        "s",
        {
            "time/data": "data",
            "time/forward": "forward",
            "time/backward": "backward",
            "time/optimizer": "optimiser",
            "time/checkpoint": "checkpoint",
        },
    ),
    Chart("Health", "Memory", "bytes", {"memory": "peak"}),
    Chart("Health", "Largest logit", "", {"max_logit": "max |logit|"}),
)

FAMILIES = (  # keys that end in a name of the user's
    ("train/loss/", "Loss by source", "Training loss: {}", "nats/token"),
    ("val/loss/", "Loss by source", "Validation loss: {}", "nats/token"),
    ("tokens/", "Loss by source", "Tokens read: {}", "tokens"),
)

LAYERS = {  # key → title, unit: the per-layer values of every architecture
    "layers/grad_norm": ("Gradient norm of the block", ""),
    "layers/update_ratio": ("Update-to-weight ratio of the block", ""),
    "layers/contribution": ("Contribution: output over input", ""),
}

CLOCKS = ("tokens", "time", "hours")  # what else than a step can be the horizontal axis, or tells of it


def layer_charts_of(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Key → title and unit of the per-layer values among these keys; unknown ones last, under their own names."""
    known = LAYERS | {key: (c.title, c.unit) for key, c in layer_charts().items() if not c.quantiles}
    found = set(keys)
    return {key: known[key] for key in known if key in found} | {key: (key, "") for key in sorted(found - known.keys())}


def spectra() -> dict[str, LayerChart]:
    """The per-layer values that are five quantiles, such as the half-lives of a layer's channels."""
    return {key: chart for key, chart in layer_charts().items() if len(chart.quantiles) == 5}


def charts(keys: Iterable[str]) -> list[Chart]:
    """The charts of these keys, in the order in which they are shown."""
    found = {key for key in keys if key not in CLOCKS}
    shown = []
    for chart in KNOWN:
        lines = {key: name for key, name in chart.lines.items() if key in found}
        if lines:
            shown.append(Chart(chart.section, chart.title, chart.unit, lines, chart.log))
        found -= lines.keys()
    return [*shown, *_others(sorted(found))]


def _others(keys: Iterable[str]) -> Iterator[Chart]:
    late = []
    for key in keys:
        for start, section, title, unit in FAMILIES:
            if key.startswith(start):
                yield Chart(section, title.format(key.removeprefix(start)), unit, {key: key})
                break
        else:
            late.append(Chart("Other", key, "", {key: key}))
    yield from late
