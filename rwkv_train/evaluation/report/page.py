"""Runs as what the page draws, and the page itself: HTML with everything in it, which asks the network for nothing."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_train.evaluation.report.charts import CLOCKS, charts, layer_charts_of, spectra
from rwkv_train.evaluation.report.metrics import Column
from rwkv_train.evaluation.report.run import Run
from rwkv_train.evaluation.report.thin import extremes, trend

_POINTS = 200_000  # of all curves together, about 12 bytes each
_BUCKETS = (60, 1500)  # of one curve, at least and at most
_EVENTS = 400  # of one run, in the list
_SAMPLES = 40
_TIMES = 48  # steps at which values of layers are shown

_HERE = Path(__file__).parent


def payload(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the page shows, as JSON has it."""
    scalars = [{key: column for key, column in run.metrics.columns.items() if column.values.ndim == 1} for run in runs]
    keys = list({key: None for columns in scalars for key in columns})
    curves = sum(key not in CLOCKS for columns in scalars for key in columns)
    buckets = int(np.clip(_POINTS // max(1, 2 * curves), *_BUCKETS))
    shown = charts(keys)
    return {
        "charts": [vars(chart) for chart in shown],
        "layers": [{"key": key, "title": title, "unit": unit} for key, title, unit in _layers(runs)],
        "spectra": [{"key": key, "title": band.title, "unit": band.unit} for key, band in spectra().items()],
        "runs": [_run(run, columns, buckets) for run, columns in zip(runs, scalars, strict=True)],
        "differences": _differences(runs),
    }


def render(data: Mapping[str, Any], live: bool = False) -> str:
    """The page.

    Args:
        data: of `payload`.
        live: whether it asks where it came from for news; else it opens no connection at all.
    """
    title = ", ".join(run["name"] for run in data["runs"][:3]) + (" …" if len(data["runs"]) > 3 else "")
    parts = {
        "title": html.escape(title),
        "connect": "'self'" if live else "'none'",
        "live": "true" if live else "false",
        "style": _read("uplot/uPlot.min.css") + _read("page.css"),
        "uplot": _read("uplot/uPlot.iife.min.js"),
        "script": _read("page.js") + _read("view.js"),
        "data": as_json(data).replace("</", "<\\/").replace("<!--", "<\\!--"),
    }
    return re.sub(
        r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("page.html")
    )  # once: contents stay as they are


def as_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _run(run: Run, columns: Mapping[str, Column], buckets: int) -> dict[str, Any]:
    bands = spectra()
    curves = {key: _curve(column, buckets) for key, column in columns.items() if key not in CLOCKS}
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
        "events": [_event(row) for row in run.events[-_EVENTS:]],
        "samples": [{"step": step, "text": text} for step, text in run.samples[-_SAMPLES:]],
        "evaluations": run.evaluations,
        "summary": _summary(run, columns),
    }


def _curve(column: Column, buckets: int) -> dict[str, Any] | None:
    """Steps as differences, values to five digits; beside the extremes the trend, where the curve is long."""
    if not len(column.steps):
        return None
    thin, mean = extremes(column, buckets), trend(column)
    curve: dict[str, Any] = {"x": _differences_of(thin), "y": _short(thin.values)}
    if mean is not None:
        curve["trend"] = {"x": _differences_of(mean), "y": _short(mean.values)}
    return curve


def _differences_of(column: Column) -> list[int]:
    differences: list[int] = np.diff(column.steps, prepend=0).tolist()
    return differences


def _short(values: Any, digits: int = 5) -> Any:
    """Numbers with so many digits, whole ones without a point; what is not finite is null."""
    if isinstance(values, np.ndarray):
        return _short(values.tolist(), digits)
    if isinstance(values, list):
        return [_short(value, digits) for value in values]
    if not np.isfinite(values):
        return None
    rounded = float(f"{values:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _over_time(column: Column) -> dict[str, Any]:
    """Values of the layers at evenly spaced steps."""
    count = len(column.steps)
    kept = np.unique(np.linspace(0, count - 1, min(count, _TIMES)).astype(int))
    return {"x": column.steps[kept].tolist(), "y": _short(column.values[kept], 4)}


def _clock(run: Run) -> dict[str, Any]:
    """Tokens and hours at up to a thousand steps; between them both grow evenly."""
    columns = run.metrics.columns
    clock: dict[str, Any] = {}
    if "tokens" in columns:
        clock["tokens"] = columns["tokens"]
    if "hours" in columns:
        clock["hours"] = columns["hours"]
    elif "seconds" in columns:
        clock["hours"] = Column(columns["seconds"].steps, np.cumsum(columns["seconds"].values) / 3600)
    for name, column in clock.items():
        kept = np.unique(np.linspace(0, len(column.steps) - 1, 1000).astype(int))
        clock[name] = {"x": column.steps[kept].tolist(), "y": _short(column.values[kept], 12)}
    return clock


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in row.items() if key not in ("event", "step", "time")}
    return {"event": row["event"], "step": row["step"], "time": row.get("time"), "rest": rest}


def _summary(run: Run, columns: Mapping[str, Column]) -> dict[str, Any]:
    """The figures that runs are compared by."""
    found: dict[str, Any] = {"step": run.last_step}

    def last(name: str, key: str) -> None:
        if key in columns and len(columns[key].values):
            found[name] = _short(float(columns[key].values[-1]), 12 if key == "tokens" else 5)

    last("tokens", "tokens")
    if "train/loss" in columns:
        found["train_loss"] = _short(float(columns["train/loss"].values[-100:].mean()))
    last("val_loss", "val/loss")
    last("bits_per_byte", "val/bits_per_byte")
    last("perplexity", "val/perplexity")
    if "val/loss" in columns:
        found["best_val_loss"] = _short(float(columns["val/loss"].values.min()))
    if "tokens_per_second" in columns:
        found["tokens_per_second"] = _short(float(np.median(columns["tokens_per_second"].values)))
    elif "seconds" in columns and "tokens" in columns:
        seconds = float(columns["seconds"].values.sum())
        found["tokens_per_second"] = _short(found["tokens"] / seconds) if seconds else None
    last("goodput", "goodput")
    if "hours" in (clock := _clock(run)):
        found["hours"] = _short(clock["hours"]["y"][-1])
    ends = [row["event"] for row in run.events if row["event"] not in ("checkpoint",)]
    found["state"] = ends[-1] if ends else None
    return found


def _layers(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    keys = {key for run in runs for key, column in run.metrics.columns.items() if column.values.ndim == 2}
    return [(key, title, unit) for key, (title, unit) in layer_charts_of(keys).items()]


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The words of the config in which the runs differ, with each run's value."""
    words = list({word: None for run in runs for word in run.config if word not in ("run.name", "run.root")})
    rows = [(word, [run.config.get(word, "–" if run.config else "?") for run in runs]) for word in words]
    return [
        {"word": word, "values": [_shown(value) for value in values]}
        for word, values in rows
        if any(value != values[0] for value in values)
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
