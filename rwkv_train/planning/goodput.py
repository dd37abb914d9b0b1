"""What failures cost a run: how often to write a checkpoint, and the share of the time that is left for training.

First order: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974); the
expected time with exponential failures: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
restart dumps", FGCS 22 (2006). Nothing here is measured but the failure rates, and those on others' machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwkv_train.planning.memory import Layout, Memory

# Failures of a node of eight GPUs in a day, as published of large runs and clusters.
FAILURE_RATES = {
    # A. Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research Clusters", HPCA 2025
    # (arXiv 2410.21680): 6.50 and 2.34 in 1,000 node-days on Meta's two clusters, eleven months, A100
    "RSC-1": 6.50e-3,
    "RSC-2": 2.34e-3,
    # "The Llama 3 Herd of Models" (arXiv 2407.21783), table 5: 419 unexpected interruptions of 16,384 H100 in 54 days
    "Llama 3": 419 / (2048 * 54),
    # S. Zhang et al., "OPT" (arXiv 2205.01068), section 2.5: at least 35 manual and an estimated 70 automatic restarts
    # for hardware failures of 992 A100 in two months
    "OPT-175B": (35 + 70) / (124 * 60),
}
DEFAULT_CLUSTER = "RSC-1"
RESTART_SECONDS = 600.0  # seconds from a failure to the first step again: noticing, queue, start, load; an assumption
COPY_RATE = 20e9  # bytes a second from a card to the host's memory; an assumption: PCIe 4 and a copy of each tensor
NODE_WRITE_RATE = 2e9  # bytes a second that a node writes to a file system; an assumption
SYSTEM_WRITE_RATE = 100e9  # bytes a second that all nodes together write to it; an assumption


@dataclass(frozen=True)
class Saving:
    """What one checkpoint costs, in seconds.

    Args:
        pause: time for which training is stopped.
        write: from its start until it is complete; training continues, and a failure meanwhile loses the save.
    """

    pause: float
    write: float


def saving(needs: Memory, layout: Layout, per_machine: int, step: float) -> Saving:
    """A checkpoint written in the background: a copy in the host's memory and the probe's pass stop the training.

    Args:
        needs: of the run, for the checkpoint's size.
        layout: how it is spread out, for who writes.
        per_machine: devices of a node.
        step: seconds of one.
    """
    writers = 1 if layout.strategy in ("single", "ddp") else layout.mesh.ranks
    nodes = -(-writers // per_machine)
    pause = needs.checkpoint / writers / COPY_RATE + step / (3 * layout.micro * layout.accumulation)
    return Saving(pause, pause + needs.checkpoint / min(nodes * NODE_WRITE_RATE, SYSTEM_WRITE_RATE))


def between_failures(nodes: int, rate: float = FAILURE_RATES[DEFAULT_CLUSTER]) -> float:
    """Mean seconds between two failures of a run on so many nodes."""
    return 86400 / (nodes * rate)


def interval(cost: Saving, failures: float) -> float:
    """The proposed seconds of training between two checkpoints: √(2 · pause · time between failures) (Young).

    Not below what writing one takes: the next one would wait for it.
    """
    return max(math.sqrt(2 * cost.pause * failures), cost.write)


def goodput(every: float, cost: Saving, failures: float) -> float:
    """The share of a run's time that goes into steps which count.

    A span of `every` seconds and its pause must pass without a failure, and is begun again after each; a restart comes
    in between, and what was trained while the last checkpoint was on its way to the disk is lost too (Daly 2006,
    equation 13, with the write time added to the restart).

    Args:
        every: seconds of training between two checkpoints.
        cost: of a checkpoint.
        failures: mean seconds between two of them.
    """
    spans = failures * math.exp((RESTART_SECONDS + cost.write) / failures) * math.expm1((every + cost.pause) / failures)
    return every / spans
