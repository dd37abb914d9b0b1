"""The report's charts as PNG files, for papers and for the end of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_train.evaluation.report.charts import CHARTS, spectra
from rwkv_train.evaluation.report.metrics_table import MetricColumn
from rwkv_train.evaluation.report.page import curve_payload
from rwkv_train.models.registry import LayerChart

COLOURS = ("#0f62ae", "#c8500a", "#117a57", "#a62c72", "#866a00", "#5a50c4", "#1c7f96", "#61666e")
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e7e9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
}
_LEGEND_ABOVE: dict[str, Any] = {"loc": "outside upper left", "ncols": 2, "fontsize": 7}
_LOSS_BUCKETS = 750  # of loss.png: two points per pixel of its width would not be seen


def draw_charts(data: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Draws every chart of a report at 300 dpi, and yields the files.

    Args:
        data: result of `payload`.
        folder: directory for the files; it is created.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, fill: Callable[[Any], None]) -> Path:
        path = folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.png"
        _save(path, (4.2, 2.8), 300, fill)
        return path

    for reported in data["charts"]:
        for chart in _split_by_key(reported, len(data["runs"])):
            if any(key in run["curves"] for run in data["runs"] for key in chart["lines"]):
                yield save(chart["title"], partial(_draw_chart, chart=chart, runs=data["runs"]))
    for run in data["runs"]:
        prefix = f"{run['name']}_" if len(data["runs"]) > 1 else ""
        for key, band in spectra().items():
            if key in run["layers"]:
                rows = run["layers"][key]
                yield save(f"{prefix}{band.title}", partial(_draw_spectrum, rows=rows, band=band, name=run["name"]))


def draw_loss_curve(rows: Sequence[Mapping[str, Any]], path: Path, title: str, baselines: Mapping[str, float]) -> None:
    """Draws training and validation loss of a run; nothing if no row has a finite training loss.

    Args:
        rows: rows of metrics.jsonl, with `step`, `train/loss` (None for a bad step) and sometimes `val/loss`.
        path: the PNG file.
        title: text above the picture.
        baselines: losses in nats per token to compare with, by name; drawn as horizontal lines.

    Raises:
        OSError: the file cannot be written.
    """
    curves, values = {}, {}
    for key in ("train/loss", "val/loss"):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        steps, losses = (np.array(column) for column in zip(*points, strict=True)) if points else (np.zeros(0),) * 2
        curve = curve_payload(MetricColumn(steps.astype(np.int64), losses.astype(np.float64)), _LOSS_BUCKETS)
        if curve is not None:
            curves[key], values[key] = curve, losses
    if "train/loss" not in curves:
        return
    chart = vars(next(chart for chart in CHARTS if "train/loss" in chart.lines))
    training, validation = values["train/loss"], values.get("val/loss", ())
    lowest = min([*training[len(training) // 2 :], *baselines.values(), *validation])
    bottom, top = max(0.0, lowest - 0.25), max(min(training[0], lowest + 3.5), lowest + 1.0)

    def fill(axes: Any) -> None:
        _draw_curves(axes, chart, [{"name": title, "curves": curves}])
        axes.set_ylim(bottom, top)
        _draw_baselines(axes, baselines)
        axes.set_title(title, fontsize=9)
        axes.legend(loc="upper right")

    _save(path, (7, 4), 150, fill)


def _save(path: Path, inches: tuple[float, float], dpi: int, fill: Callable[[Any], None]) -> None:
    """Writes a PNG file with one plot; `fill` draws into its axes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches, dpi=dpi, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure.add_subplot())
        figure.savefig(path, format="png")


def _split_by_key(chart: Mapping[str, Any], runs: int) -> list[Mapping[str, Any]]:
    """The chart itself, or with several runs one chart for each of its keys, because colours then mean runs."""
    is_pair = all(key.startswith(("train/", "val/")) for key in chart["lines"])
    if runs == 1 or is_pair:
        return [chart]
    split = len(chart["lines"]) > 1
    return [
        {**chart, "lines": {key: name}, "title": f"{chart['title']}: {name}" if split else chart["title"]}
        for key, name in chart["lines"].items()
    ]


def _draw_chart(axes: Any, chart: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
    """A chart with a legend above if it has several curves."""
    _draw_curves(axes, chart, runs)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.figure.legend(**_LEGEND_ABOVE)


def _draw_curves(axes: Any, chart: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
    """The curves of a chart: thin with their trend on top, or bold if they are too short for a trend."""
    many, lowest, highest = len(runs) > 1, np.inf, -np.inf
    for number, run in enumerate(runs):
        for index, (key, name) in enumerate(chart["lines"].items()):
            curve = run["curves"].get(key)
            if curve is None:
                continue
            is_validation = key.startswith("val/")
            colour = COLOURS[(number if many else index) % len(COLOURS)]
            label = name if not many else run["name"] if index == 0 else None
            steps, values = np.cumsum(curve["x"]), np.array(curve["y"], float)
            lowest, highest = min(lowest, values.min()), max(highest, values.max())
            trend = None if is_validation else curve.get("trend")
            if trend is not None:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.5)
                steps, values = np.cumsum(trend["x"]), np.array(trend["y"], float)
            markers = {"marker": "o", "markersize": 2} if is_validation else {}
            axes.plot(steps, values, color=colour, label=label, **markers)
            if is_validation and many:
                axes.lines[-1].set_linestyle("--")
    if chart["log"] and lowest > 0 and highest / lowest > 20:
        axes.set_yscale("log")
    axes.set_xlabel("optimiser steps")
    dashed = ["dashed: validation"] if many and len(chart["lines"]) > 1 else []
    notes = ", ".join([chart["unit"], *dashed] if chart["unit"] else dashed)
    axes.set_ylabel(f"{chart['title']} ({notes})" if notes else chart["title"])


def _draw_baselines(axes: Any, baselines: Mapping[str, float]) -> None:
    """Horizontal lines with labels right of the axes, which are stacked where lines are close together.

    Those above the axes are left out.
    """
    bottom, top = axes.get_ylim()
    free = bottom
    for name, loss in sorted(baselines.items(), key=lambda item: item[1]):
        if loss > top:
            break
        axes.axhline(loss, color=COLOURS[-1], linestyle="--", linewidth=0.8, zorder=1)
        height = max(loss, free)
        free = height + 0.035 * (top - bottom)
        text = axes.annotate(f" {name} {loss:.2f}", (1, height), xycoords=("axes fraction", "data"), va="center")
        text.set_fontsize(7)


def _draw_spectrum(axes: Any, rows: Mapping[str, Any], band: LayerChart, name: str) -> None:
    """Quantiles of a value over the layers, at the first and the last of the recorded steps."""
    first, last = (np.array(rows["y"][index], float) for index in (0, -1))  # (L, 5)
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
    axes.figure.legend(**_LEGEND_ABOVE)
