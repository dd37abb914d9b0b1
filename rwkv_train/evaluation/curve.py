"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def draw_loss_curve(rows: Sequence[Mapping[str, Any]], path: Path, title: str, lines: Mapping[str, float]) -> None:
    """Draws train/loss (thin: each step; bold: a running mean) and val/loss of metrics.jsonl into a PNG.

    Args:
        rows: of metrics.jsonl.
        path: of the PNG.
        title: above the curve.
        lines: name → loss of what the run is compared with, as horizontal lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["train/loss"] for row in rows])
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.6)
    window = min(50, len(losses))
    if window:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color="#2171b5", label=f"training (mean of {window} steps)")
    validated = [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]
    if validated:
        axes.plot(*zip(*validated, strict=True), color="#d94801", marker="o", markersize=4, label="validation")
    for shade, (name, loss) in enumerate(lines.items()):
        axes.axhline(loss, color=str(0.25 + 0.12 * (shade % 5)), linestyle="--", linewidth=0.9)
        axes.text(steps[-1], loss, f"{name} {loss:.2f}", ha="right", va="bottom", fontsize=8, color="#444444")
    low = min([*losses[len(losses) // 2 :], *lines.values(), *(loss for _, loss in validated)])
    axes.set_ylim(max(0.0, low - 0.25), max(min(losses[0], low + 3.5), low + 1.0))
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right")
    figure.tight_layout()
    aside = path.with_name(f".{path.name}")  # a full disk leaves the curve that was there
    figure.savefig(aside)
    aside.replace(path)
