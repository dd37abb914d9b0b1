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

    if all(row["train/loss"] is None for row in rows):
        return
    figure = Figure(figsize=(9, 5), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = [row for row in rows if row["train/loss"] is not None]  # of a bad step it is null
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["train/loss"] for row in rows])
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.6)
    window = max(1, min(50, len(losses) // 10))
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    middle = steps[(window - 1) // 2 :][: len(mean)]  # of each mean's steps: at their end it would lag behind
    axes.plot(middle, mean, color="#2171b5", label=f"training (mean of {window} steps)")
    validated = [(row["step"], row["val/loss"]) for row in rows if row.get("val/loss") is not None]
    if validated:
        axes.plot(*zip(*validated, strict=True), color="#d94801", marker="o", markersize=4, label="validation")
    low = min([*losses[len(losses) // 2 :], *lines.values(), *(loss for _, loss in validated)])
    bottom, top = max(0.0, low - 0.25), max(min(losses[0], low + 3.5), low + 1.0)
    axes.set_ylim(bottom, top)
    free = bottom  # labels stand beside the picture, one above the other, though their lines may touch
    for name, loss in sorted(lines.items(), key=lambda item: item[1]):
        axes.axhline(loss, color="#777777", linestyle="--", linewidth=0.9)
        place = max(loss, free)
        free = place + 0.035 * (top - bottom)
        axes.annotate(f" {name} {loss:.2f}", (1, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path)
