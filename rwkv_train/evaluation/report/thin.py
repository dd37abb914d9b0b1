"""Long curves as few points, of which nobody sees that they are few."""

from __future__ import annotations

import numpy as np

from rwkv_train.evaluation.report.metrics import Column


def extremes(column: Column, buckets: int) -> Column:
    """The smallest and the largest value of each bucket at their own steps, and both ends: spikes survive.

    Args:
        column: (N,) values.
        buckets: at least 1; up to 2 · buckets + 2 points are left.
    """
    count = len(column.steps)
    if count <= 2 * buckets + 2:
        return column
    inner = column.values[1:-1]
    size = -(-len(inner) // buckets)
    whole = len(inner) // size
    rows = inner[: whole * size].reshape(whole, size)
    starts = np.arange(whole) * size
    places = [starts + rows.argmin(1), starts + rows.argmax(1)]
    rest = inner[whole * size :]
    if len(rest):
        places.append(whole * size + np.array([rest.argmin(), rest.argmax()]))
    kept = np.unique(np.concatenate([[0], *(place + 1 for place in places), [count - 1]]))
    return Column(column.steps[kept], column.values[kept])


def trend(column: Column, points: int = 300) -> Column | None:
    """A running mean over about a hundredth of the curve, centred; None where the curve is too short for one."""
    count = len(column.steps)
    window = count // 100
    if window < 3:
        return None
    sums = np.concatenate([[0.0], np.cumsum(column.values)])
    middles = np.unique(np.linspace(0, count - 1, points).astype(int))
    to_end = np.minimum(middles, count - 1 - middles)
    half = np.minimum(window // 2, np.maximum(to_end, window // 8))  # narrower and hardly lopsided at the ends
    low, high = np.maximum(0, middles - half), np.minimum(count, middles + half + 1)
    return Column(column.steps[middles], (sums[high] - sums[low]) / (high - low))
