"""The report's charts as PNGs for papers: the same thinned data, 300 dots an inch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_train.evaluation.report.charts import spectra
from rwkv_train.models.registry import LayerChart

COLOURS = ("#0f62ae", "#c8500a", "#117a57", "#a62c72", "#866a00", "#5a50c4", "#1c7f96", "#61666e")
_LOOK: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e7e9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
}
_ABOVE: dict[str, Any] = {"loc": "outside upper left", "ncols": 2, "fontsize": 7}


def draw(data: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Draws every chart of a `payload` into a folder (made here) and yields the files.

    Raises:
        OSError: the folder cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)

    def saved(name: str, fill: Any) -> Path:
        with matplotlib.rc_context(_LOOK):
            figure = Figure(figsize=(4.2, 2.8), dpi=300, layout="constrained")
            FigureCanvasAgg(figure)
            fill(figure.add_subplot())
            path = folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.png"
            figure.savefig(path)
        return path

    for whole in data["charts"]:
        for chart in _parts(whole, len(data["runs"])):
            if any(key in run["curves"] for run in data["runs"] for key in chart["lines"]):
                yield saved(chart["title"], lambda axes, chart=chart: _curves(axes, chart, data["runs"]))
    for run in data["runs"]:
        for key, band in spectra().items():
            if key in run["layers"]:
                prefix = f"{run['name']}_" if len(data["runs"]) > 1 else ""
                rows = run["layers"][key]
                yield saved(
                    f"{prefix}{band.title}",
                    lambda axes, rows=rows, band=band, name=run["name"]: _spectrum(axes, rows, band, name),
                )


def _parts(chart: Mapping[str, Any], runs: int) -> list[Mapping[str, Any]]:
    """The chart, or one for each of its keys: colours are of runs where there are several."""
    pair = all(key.startswith(("train/", "val/")) for key in chart["lines"])
    if runs == 1 or pair:
        return [chart]
    split = len(chart["lines"]) > 1
    return [
        {**chart, "lines": {key: name}, "title": f"{chart['title']}: {name}" if split else chart["title"]}
        for key, name in chart["lines"].items()
    ]


def _curves(axes: Any, chart: Mapping[str, Any], runs: Any) -> None:
    many, lowest, highest = len(runs) > 1, np.inf, -np.inf
    for number, run in enumerate(runs):
        for place, (key, name) in enumerate(chart["lines"].items()):
            curve = run["curves"].get(key)
            if curve is None:
                continue
            held = key.startswith("val/")
            colour = COLOURS[(number if many else place) % len(COLOURS)]
            label = name if not many else run["name"] if place == 0 else None
            steps, values = np.cumsum(curve["x"]), np.array(curve["y"], float)
            lowest, highest = min(lowest, values.min()), max(highest, values.max())
            trend = None if held else curve.get("trend")
            if trend is not None:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.5)
                steps, values = np.cumsum(trend["x"]), np.array(trend["y"], float)
            axes.plot(steps, values, color=colour, label=label, **({"marker": "o", "markersize": 2} if held else {}))
            if held and many:
                axes.lines[-1].set_linestyle("--")
    if chart["log"] and lowest > 0 and highest / lowest > 20:
        axes.set_yscale("log")
    axes.set_xlabel("optimiser steps")
    dashed = ["dashed: validation"] if many and len(chart["lines"]) > 1 else []
    notes = ", ".join([chart["unit"], *dashed] if chart["unit"] else dashed)
    axes.set_ylabel(f"{chart['title']} ({notes})" if notes else chart["title"])
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.figure.legend(**_ABOVE)


def _spectrum(axes: Any, rows: Mapping[str, Any], band: LayerChart, name: str) -> None:
    first, last = (np.array(rows["y"][place], float) for place in (0, -1))  # (L, 5)
    layers = np.arange(len(last))
    axes.fill_between(layers, last[:, 0], last[:, 4], color=COLOURS[0], alpha=0.15, linewidth=0, label="all channels")
    axes.fill_between(layers, last[:, 1], last[:, 3], color=COLOURS[0], alpha=0.3, linewidth=0, label="10–90 %")
    axes.plot(layers, last[:, 2], color=COLOURS[0], marker="o", markersize=3, label=f"median, step {rows['x'][-1]:,}")
    axes.plot(layers, first[:, 2], color=COLOURS[-1], linestyle="--", label=f"median, step {rows['x'][0]:,}")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{band.title}: {band.unit}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(name, fontsize=8, loc="right")
    axes.figure.legend(**_ABOVE)
