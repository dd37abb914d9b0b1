"""The charts of the metrics in docs/metrics.md: which are drawn together, their order, titles and units.

A key that is not listed here gets a chart of its own in the section "Other".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rwkv_train.models.registry import LayerChart, layer_charts


@dataclass(frozen=True)
class Chart:
    """A chart of one metric, or of several with the same unit.

    Attributes:
        section: heading under which the chart is shown.
        title: title of the chart.
        unit: unit of the values; empty for a number without one.
        lines: label of each curve, by key of metrics.jsonl.
        log: whether a logarithmic scale suits the values.
    """

    section: str
    title: str
    unit: str
    lines: dict[str, str] = field(default_factory=dict)
    log: bool = False


CHARTS = (
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
    Chart("Speed", "Time of a step", "s", {"seconds": "complete step"}),
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

FAMILIES = (  # prefixes of keys that end in the name of a source: (prefix, section, title, unit)
    ("train/loss/", "Loss by source", "Training loss: {}", "nats/token"),
    ("val/loss/", "Loss by source", "Validation loss: {}", "nats/token"),
    ("tokens/", "Loss by source", "Tokens read: {}", "tokens"),
)

LAYERS = {  # key → title, unit: the per-layer values of every architecture
    "layers/grad_norm": ("Gradient norm of the block", ""),
    "layers/update_ratio": ("Update-to-weight ratio of the block", ""),
    "layers/contribution": ("Contribution: output over input", ""),
}

AXIS_KEYS = ("tokens", "time", "hours")  # keys for the horizontal axis, which have no chart of their own


def layer_charts_of(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Key → title and unit of the per-layer values among these keys; unknown ones last, under their own names."""
    known = LAYERS | {key: (c.title, c.unit) for key, c in layer_charts().items() if not c.quantiles}
    found = set(keys)
    return {key: known[key] for key in known if key in found} | {key: (key, "") for key in sorted(found - known.keys())}


def spectra() -> dict[str, LayerChart]:
    """The per-layer values that are five quantiles, such as the half-lives of a layer's channels."""
    return {key: chart for key, chart in layer_charts().items() if len(chart.quantiles) == 5}


def charts(keys: Iterable[str]) -> list[Chart]:
    """The charts that show these keys of metrics.jsonl, in the order of the page."""
    remaining = {key for key in keys if key not in AXIS_KEYS}
    known = []
    for chart in CHARTS:
        lines = {key: name for key, name in chart.lines.items() if key in remaining}
        if lines:
            known.append(Chart(chart.section, chart.title, chart.unit, lines, chart.log))
        remaining -= lines.keys()
    return [*known, *_unlisted(sorted(remaining))]


def _unlisted(keys: Iterable[str]) -> Iterator[Chart]:
    """A chart for each key that CHARTS does not list: those of FAMILIES first."""
    others = []
    for key in keys:
        for prefix, section, title, unit in FAMILIES:
            if key.startswith(prefix):
                yield Chart(section, title.format(key.removeprefix(prefix)), unit, {key: key})
                break
        else:
            others.append(Chart("Other", key, "", {key: key}))
    yield from others
