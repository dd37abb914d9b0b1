"""How large a loss may be before it counts as a spike."""

from __future__ import annotations

import math
from collections import deque

MIN_DEVIATION = 0.01  # of the median: after nearly equal losses the next small bump is no spike


class Window:
    """The last losses, and the limit for the next one: their median plus z robust standard deviations.

    The deviation is 1.4826 · median |loss - median|, which is σ of a normal distribution, and at least 1 % of the
    median.

    Args:
        size: number of losses that are kept; half of them are needed before there is a limit.
        z: number of robust standard deviations.
        losses: in nats, to begin with.
    """

    def __init__(self, size: int, z: float, losses: list[float] | None = None) -> None:
        self.z, self.losses = z, deque(losses or [], maxlen=size)

    def add(self, loss: float | None) -> None:
        """Keeps a loss; None, of a step whose loss is not finite, is left out."""
        if loss is not None:
            self.losses.append(loss)

    def limit(self) -> float:
        """The largest loss that is no spike, in nats; infinite while too few losses are known."""
        if 2 * len(self.losses) < (self.losses.maxlen or 0):
            return math.inf
        middle = sorted(self.losses)[len(self.losses) // 2]
        deviation = 1.4826 * sorted(abs(loss - middle) for loss in self.losses)[len(self.losses) // 2]
        return middle + self.z * max(deviation, MIN_DEVIATION * abs(middle))
