"""The data of a report as JSON, and the page: one HTML file with all of it that loads nothing from the network."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_train.evaluation.report.charts import AXIS_KEYS, charts, layer_charts_of, spectra
from rwkv_train.evaluation.report.metrics_table import MetricColumn, extremes, trend
from rwkv_train.evaluation.report.recorded_run import RecordedRun
from rwkv_train.json_files import presentable

_MAX_POINTS = 200_000  # of all curves together, about 12 bytes each
_MIN_BUCKETS, _MAX_BUCKETS = 60, 1500  # of one curve
_MAX_EVENTS = 400  # listed per run
_MAX_SAMPLES = 40  # shown per run
_MAX_LAYER_STEPS = 48  # steps at which values per layer are shown
_MAX_CLOCK_POINTS = 1000

_FOLDER = Path(__file__).parent


def payload(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """Everything that the page shows, as JSON values.

    Args:
        runs: at least one, refreshed.

    Returns:
        `charts` (fields of Chart), `layers` (key, title, unit), `runs` (a dict each), and `differences` (settings that
        differ between the runs).
    """
    scalars = [{key: column for key, column in run.metrics.columns.items() if column.values.ndim == 1} for run in runs]
    keys = list({key: None for columns in scalars for key in columns})
    curves = sum(key not in AXIS_KEYS for columns in scalars for key in columns)
    buckets = int(np.clip(_MAX_POINTS // max(1, 2 * curves), _MIN_BUCKETS, _MAX_BUCKETS))
    data = {
        "charts": [vars(chart) for chart in charts(keys)],
        "layers": [{"key": key, "title": title, "unit": unit} for key, title, unit in _layers(runs)],
        "spectra": [{"key": key, "title": band.title, "unit": band.unit} for key, band in spectra().items()],
        "runs": [_run_payload(run, columns, buckets) for run, columns in zip(runs, scalars, strict=True)],
        "differences": _differences(runs),
    }
    return dict(presentable(data))


def render(data: Mapping[str, Any], live: bool = False) -> str:
    """The HTML page.

    Args:
        data: result of `payload`.
        live: whether the page polls its server for new data; otherwise it may open no connection at all.
    """
    title = ", ".join(run["name"] for run in data["runs"][:3]) + (" …" if len(data["runs"]) > 3 else "")
    parts = {
        "title": html.escape(title),
        "connect": "'self'" if live else "'none'",
        "live": "true" if live else "false",
        "style": _read("uplot/uPlot.min.css") + _read("page.css"),
        "uplot": _read("uplot/uPlot.iife.min.js"),
        "script": _read("page.js") + _read("view.js"),
        "data": as_json(data),
    }
    return re.sub(
        r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html")
    )  # in one pass: braces in the data are not replaced


def as_json(data: Mapping[str, Any]) -> str:
    """The data as JSON that may be part of an HTML page: without "<", nothing in it begins a tag or a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c")


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _run_payload(run: RecordedRun, columns: Mapping[str, MetricColumn], buckets: int) -> dict[str, Any]:
    bands = spectra()
    curves = {key: curve_payload(column, buckets) for key, column in columns.items() if key not in AXIS_KEYS}
    return {
        "name": run.name,
        "path": str(run.path),
        "notes": run.notes,
        "clock": _clock(run),
        "curves": {key: curve for key, curve in curves.items() if curve is not None},
        "layers": {
            key: _over_time(column)
            for key, column in run.metrics.columns.items()
            if column.values.ndim == 2 or (key in bands and column.values.ndim == 3 and column.values.shape[2] == 5)
        },
        "events": [_event(row) for row in run.events[-_MAX_EVENTS:]],
        "samples": [{"step": step, "text": text} for step, text in run.samples[-_MAX_SAMPLES:]],
        "evaluations": run.evaluations,
        "summary": _summary(run, columns),
    }


def curve_payload(column: MetricColumn, buckets: int) -> dict[str, Any] | None:
    """A curve as JSON values.

    Args:
        column: scalar values, (N,).
        buckets: number of buckets that a long curve is reduced to.

    Returns:
        `x`, the differences of the steps; `y`, the values to five digits; and `trend` with its own `x` and `y` if the
        curve is long enough. None if the column is empty.
    """
    if not len(column.steps):
        return None
    reduced, mean = extremes(column, buckets), trend(column)
    curve: dict[str, Any] = {"x": _step_differences(reduced), "y": _rounded(reduced.values)}
    if mean is not None:
        curve["trend"] = {"x": _step_differences(mean), "y": _rounded(mean.values)}
    return curve


def _step_differences(column: MetricColumn) -> list[int]:
    differences: list[int] = np.diff(column.steps, prepend=0).tolist()
    return differences


def _rounded(values: Any, digits: int = 5) -> Any:
    """Numbers rounded to significant digits, integers without a decimal point; None for values that are not finite."""
    if isinstance(values, np.ndarray):
        return _rounded(values.tolist(), digits)
    if isinstance(values, list):
        return [_rounded(value, digits) for value in values]
    if not np.isfinite(values):
        return None
    rounded = float(f"{values:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _over_time(column: MetricColumn) -> dict[str, Any]:
    """Values per layer at evenly spaced steps."""
    count = len(column.steps)
    kept = np.unique(np.linspace(0, count - 1, min(count, _MAX_LAYER_STEPS)).astype(int))
    return {"x": column.steps[kept].tolist(), "y": _rounded(column.values[kept], 4)}


def _clock(run: RecordedRun) -> dict[str, Any]:
    """Tokens and hours by step, for the other horizontal axes; the page interpolates between the points."""
    columns = run.metrics.columns
    clock: dict[str, Any] = {}
    if "tokens" in columns:
        clock["tokens"] = columns["tokens"]
    if "hours" in columns:
        clock["hours"] = columns["hours"]
    elif "seconds" in columns:
        clock["hours"] = MetricColumn(columns["seconds"].steps, np.cumsum(columns["seconds"].values) / 3600)
    for name, column in clock.items():
        kept = np.unique(np.linspace(0, len(column.steps) - 1, _MAX_CLOCK_POINTS).astype(int))
        clock[name] = {"x": column.steps[kept].tolist(), "y": _rounded(column.values[kept], 12)}
    return clock


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    """An event as the page expects it: its further fields are in `rest`."""
    rest = {key: value for key, value in row.items() if key not in ("event", "step", "time")}
    return {"event": row["event"], "step": row["step"], "time": row.get("time"), "rest": rest}


def _summary(run: RecordedRun, columns: Mapping[str, MetricColumn]) -> dict[str, Any]:
    """The figures of the summary table; those that the run lacks are missing."""
    figures: dict[str, Any] = {"step": run.last_step}

    def last(name: str, key: str) -> None:
        if key in columns and len(columns[key].values):
            figures[name] = _rounded(float(columns[key].values[-1]), 12 if key == "tokens" else 5)

    last("tokens", "tokens")
    if "train/loss" in columns:
        figures["train_loss"] = _rounded(float(columns["train/loss"].values[-100:].mean()))
    last("val_loss", "val/loss")
    last("bits_per_byte", "val/bits_per_byte")
    last("perplexity", "val/perplexity")
    if "val/loss" in columns:
        figures["best_val_loss"] = _rounded(float(columns["val/loss"].values.min()))
    if "tokens_per_second" in columns:
        figures["tokens_per_second"] = _rounded(float(np.median(columns["tokens_per_second"].values)))
    elif "seconds" in columns and "tokens" in columns:
        seconds = float(columns["seconds"].values.sum())
        figures["tokens_per_second"] = _rounded(figures["tokens"] / seconds) if seconds else None
    last("goodput", "goodput")
    if "hours" in (clock := _clock(run)):
        figures["hours"] = _rounded(clock["hours"]["y"][-1])
    events = [row["event"] for row in run.events if row["event"] != "checkpoint"]
    figures["state"] = events[-1] if events else None
    return figures


def _layers(runs: Sequence[RecordedRun]) -> list[tuple[str, str, str]]:
    """Key, title and unit of each metric with a value per layer: known ones first."""
    keys = {key for run in runs for key, column in run.metrics.columns.items() if column.values.ndim == 2}
    return [(key, title, unit) for key, (title, unit) in layer_charts_of(keys).items()]


def _differences(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """The settings in which the runs differ, with each run's value."""
    settings = list({name: None for run in runs for name in run.config if name not in ("run.name", "run.root")})
    rows = [(name, [run.config.get(name, "–" if run.config else "?") for run in runs]) for name in settings]
    return [
        {"setting": name, "values": [_setting_text(value) for value in values]}
        for name, values in rows
        if any(value != values[0] for value in values)
    ]


def _setting_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
