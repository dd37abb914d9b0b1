"""Strategy × passes a step × precision × clipping × vocab.extend × masks: each run equals that of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from rwkv_train.models import ARCHITECTURES
from tests.exact.matrix import (
    CLIP,
    LR,
    SAMPLES,
    Cell,
    Outcome,
    complete,
    config_of,
    run_alone,
    run_in_turn,
    write_inputs,
)

RANKS = 2
STRATEGIES = ("ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3")
OFFLOAD = ("deepspeed_1_offload", "deepspeed_2_offload", "deepspeed_3_offload")
MICRO = {passes: SAMPLES // (RANKS * passes) for passes in (1, 2, 4)}

LOSS, NORM = 1e-6, 1e-5  # relative, of float32 sums in another order
MOVE = 3 * LR  # the most that a step moves a weight: the largest multiplier of the recipe
ROUNDING = 2.0**-23  # relative, of a float32


def differences(cell: Cell, outcomes: Sequence[Outcome], alone: Outcome) -> Iterator[str]:
    """How a run differs from that of one process."""
    for outcome in outcomes:
        if outcome.losses != pytest.approx(alone.losses, rel=LOSS):
            yield f"{cell}: losses {outcome.losses}, of one process {alone.losses}"
        if outcome.norms != pytest.approx(alone.norms, rel=NORM):
            yield f"{cell}: gradient norms {outcome.norms}, of one process {alone.norms}"
    found, expected = complete(outcomes), complete([alone])
    if found.keys() != expected.keys():
        yield f"{cell}: parameters {sorted(found.keys() ^ expected.keys())}"
    for name in sorted(found.keys() & expected.keys()):
        apart = np.abs(found[name] - expected[name])  # NaN where no rank has an element
        wrong = ~(apart <= cell.steps * (MOVE * NORM + ROUNDING * np.abs(expected[name])))
        if wrong.any():
            yield f"{cell}: {wrong.sum()} of {wrong.size} elements of {name} differ, by {apart.max():.2g}"
            break  # the others would fill pages


def compare(run_ranks: Callable[..., list[list[Outcome]]], folder: Path, cells: Sequence[Cell], seconds: float) -> None:
    write_inputs(folder)
    alone = {cell.alone(): run_alone(cell.alone(), folder) for cell in cells}
    for cell, outcome in alone.items():
        assert len(outcome.losses) == cell.steps
        assert min(outcome.norms) > 2 * CLIP, cell  # clipping acts, where it is on
    of_ranks = run_ranks(run_in_turn, RANKS, [config_of(cell, folder, RANKS) for cell in cells], seconds=seconds)
    together = zip(cells, zip(*of_ranks, strict=True), strict=True)
    problems = [text for cell, outcomes in together for text in differences(cell, outcomes, alone[cell.alone()])]
    assert not problems, "\n".join(dict.fromkeys(problems))  # once where all ranks have the same


# Each strategy with each number of passes, and each with bf16-mixed, without clipping, with new tokens and with masks.
COVERING = [
    *(Cell(name, MICRO[1], clip=None, extended=True) for name in STRATEGIES),
    *(Cell(name, MICRO[2], masked=True) for name in STRATEGIES),
    *(Cell(name, MICRO[4], "bf16-mixed", extended=True) for name in STRATEGIES),
    *(Cell(name, MICRO[2], arch=arch) for arch in ARCHITECTURES if arch != "rwkv4" for name in STRATEGIES),
]
PLAIN, EXTENDED, MASKED = (False, False), (True, False), (False, True)
ALL = [
    Cell(name, micro, precision, clip, *data)
    for name, micro, precision in product((*STRATEGIES, *OFFLOAD), MICRO.values(), ("32-true", "bf16-mixed"))
    for clip, data in ((CLIP, PLAIN), (CLIP, EXTENDED), (CLIP, MASKED), (None, PLAIN))
]


def test_a_covering_part(run_ranks: Callable[..., list[list[Outcome]]], tmp_path: Path) -> None:
    compare(run_ranks, tmp_path, COVERING, seconds=120)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all(run_ranks: Callable[..., list[list[Outcome]]], tmp_path: Path) -> None:
    compare(run_ranks, tmp_path, ALL, seconds=800)
