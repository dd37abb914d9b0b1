"""What the rows of a run say of its health: spikes, plateaus, dead layers, growing logits. Numbers in, words out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import fmean, median
from typing import Any

from rwkv_train.models.registry import layer_charts

LEAST = 0.01  # of the median: a window of nearly equal losses makes no spike of the next small bump
PLATEAU = 1000  # steps that are compared with as many before them
PROGRESS = 1e-3  # share by which the loss must have fallen in between
DEAD = 1e-6  # a layer's gradient below this share of the median of all layers
LOGITS = 50.0  # above it, and half as much again as before: growing
BEFORE = 5  # rows with the values of each layer between two that are compared


class Window:
    """The last losses, and how large the next one may be: the median and z robust standard deviations above it.

    The deviation is 1.4826 · median |loss - median| (of a normal distribution it is σ), and at least 1 % of the median.

    Args:
        size: losses that are kept; half of them are needed before there is a limit.
        z: robust standard deviations.
        losses: the ones to begin with.
    """

    def __init__(self, size: int, z: float, losses: list[float] | None = None) -> None:
        self.z, self.losses = z, deque(losses or [], maxlen=size)

    def add(self, loss: float | None) -> None:
        """One that is not finite, None, is passed over."""
        if loss is not None:
            self.losses.append(loss)

    def limit(self) -> float:
        """The largest loss that is no spike; infinite while too few are known."""
        if 2 * len(self.losses) < (self.losses.maxlen or 0):
            return math.inf
        middle = sorted(self.losses)[len(self.losses) // 2]
        deviation = 1.4826 * sorted(abs(loss - middle) for loss in self.losses)[len(self.losses) // 2]
        return middle + self.z * max(deviation, LEAST * abs(middle))


class Alerts:
    """Looks at each row and tells, once at a time, what will cost the run if nobody looks."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=2 * PLATEAU)
        self._peak = 0.0  # largest learning rate
        self._seen: deque[Mapping[str, Any]] = deque(maxlen=BEFORE)  # rows with the values of each layer
        self._told: dict[str, int] = {}  # kind → step of its last alert

    def see(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(kind, text) of what the row makes worth an alert."""
        if row["train/loss"] is not None:
            self._losses.append(row["train/loss"])
        self._peak = max(self._peak, row["lr"])
        found = dict(self._plateau(row))
        if "layers/update_ratio" in row:
            found |= dict(self._dead(row)) | dict(self._growing(row))
            self._seen.append(row)
        step = row["step"]
        new = [(kind, text) for kind, text in found.items() if step - self._told.get(kind, -math.inf) >= 5 * PLATEAU]
        self._told.update({kind: step for kind, _ in new})
        return new

    def _plateau(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if row["step"] % PLATEAU or len(self._losses) < 2 * PLATEAU or row["lr"] < 0.1 * self._peak:
            return
        losses = list(self._losses)
        before, now = fmean(losses[:PLATEAU]), fmean(losses[PLATEAU:])
        if now <= before * (1 - PROGRESS):
            return
        update = next((seen["update_ratio"] for seen in reversed(self._seen) if seen.get("update_ratio")), None)
        if row["clip_share"] > 0.5:
            cause = f"{row['clip_share']:.0%} of the steps are clipped: optim.lr is too high, or the data is broken"
        elif update is not None and update < 1e-5:
            cause = f"a step changes the weights by {update:.1e} only: optim.lr is too low"
        else:
            cause = "at this learning rate the model has learnt of this data what it can: lower optim.lr, or enlarge"
        yield "plateau", f"the loss was {before:.4f} and is {now:.4f}, {PLATEAU} steps later; {cause}"

    def _dead(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if len(self._seen) < 2 or "layers/grad_norm" not in row:
            return
        dead = set(range(len(row["layers/grad_norm"])))
        for seen in (row, self._seen[-1], self._seen[-2]):  # three in a row
            norms = seen.get("layers/grad_norm") or []
            known = [norm for norm in norms if norm is not None]
            middle = median(known) if known else 0.0
            dead &= {layer for layer, norm in enumerate(norms) if norm is not None and norm < DEAD * middle}
        if dead:
            causes = {
                key: chart.saturation for key, chart in layer_charts().items() if chart.saturation and row.get(key)
            }
            known = [cause for key, cause in causes.items() if any((row[key][layer] or 0.0) > 0.95 for layer in dead)]
            cause = known[0] if known else "nothing flows back through it"
            names = ", ".join(str(layer) for layer in sorted(dead))
            yield (
                "dead layer",
                f"layers {names} have no gradient any more: {cause}; optim.lr was too high, or it is frozen",
            )

    def _growing(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        now = row.get("max_logit")
        if now is None or len(self._seen) < BEFORE:
            return
        before = self._seen[0].get("max_logit")
        if before is not None and now > LOGITS and now > 1.5 * before:
            yield (
                "growing logits",
                (
                    f"the largest logit was {before:.0f} and is {now:.0f}; optim.l2wrap (1e-4 in the recipe) keeps "
                    "them small, a lower optim.lr or weight decay of the head as well"
                ),
            )
