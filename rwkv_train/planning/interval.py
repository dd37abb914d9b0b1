"""How often a checkpoint is worth its time, and what goodput is left: Young's and Daly's formulas.

J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, "A higher
order estimate of the optimum checkpoint interval for restart dumps", FGCS 22, 2006. Failures come by chance, at a
constant rate; a checkpoint stops the training, a failure costs what was done since the last one, and the restart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Assumed, since they are the site's: what `rwkv-train status` tells of a run's checkpoints is better.
PROBE = 1.0  # seconds that every checkpoint stops the training: the probe loss, agreement
COPY = 10e9  # bytes per second of one device's state into the host's memory, while training waits
STORE = 2e9  # bytes per second of one machine's files, while it goes on,
STORES = 100e9  # and of all machines'

# Failures of one machine and day, as published for clusters of eight GPUs a machine.
RATES = {
    # A. Dubey et al., "The Llama 3 Herd of Models", 2024, section 3.3.4: 419 unexpected interruptions in 54 days of
    # 16,384 H100
    "Llama 3": 419 / 54 / (16384 / 8),
    # A. Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research Clusters", 2024: 6.50 and 2.34
    # failures in a thousand node-days
    "RSC-1": 6.50e-3,
    "RSC-2": 2.34e-3,
}


@dataclass(frozen=True)
class Cost:
    """What checkpoints and restarts take, in seconds.

    Args:
        pause: that a checkpoint stops the training.
        writing: from then until it counts.
        restart: from a failure to the first step: noticing, the queue, starting, reading.
    """

    pause: float
    writing: float = 0.0
    restart: float = 300.0


def cost(state: float, owners: int, machines: int, background: bool) -> Cost:
    """What a checkpoint takes.

    Args:
        state: bytes of all of it.
        owners: devices among which it is shared out.
        machines: on which these are.
        background: whether it is written while the training goes on.
    """
    pause = PROBE + state / owners / COPY
    writing = state / min(STORE * min(owners, machines), STORES)
    return Cost(pause, writing) if background else Cost(pause + writing)


def between_failures(machines: int, rate: float) -> float:
    """Seconds between two failures of a run, on average.

    Args:
        machines: that all must work.
        rate: failures of one machine and day.
    """
    return 86400 / (machines * rate)


def interval(cost: Cost, mtbf: float) -> float:
    """Daly's optimum: seconds of training between two checkpoints (his equation 37), one after the other.

    Args:
        cost: of each.
        mtbf: seconds between two failures.
    """
    if cost.pause >= 2 * mtbf:
        return max(mtbf, cost.writing)
    part = cost.pause / (2 * mtbf)
    best = math.sqrt(2 * cost.pause * mtbf) * (1 + math.sqrt(part) / 3 + part / 9) - cost.pause
    return max(best, cost.pause, cost.writing)


def goodput(every: float, cost: Cost, mtbf: float) -> float:
    """The share of time that goes into steps that count (from Daly's equation 20).

    A checkpoint that is written in the background counts only when that is done: a failure costs its writing as well.

    Args:
        every: seconds of training between two checkpoints.
        cost: of checkpoints and restarts.
        mtbf: seconds between two failures.
    """
    lost = mtbf * math.exp((cost.restart + cost.writing) / mtbf) * math.expm1((every + cost.pause) / mtbf)
    return every / lost
