"""Whether a step is good: how large its loss may be, and the verdict, which is made on the device without a wait."""

from __future__ import annotations

import math
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from rwkv_train.config import EVIDENCE_BYTES
from rwkv_train.models import State

LARGEST_FINITE = torch.finfo(torch.float32).max


class StepVerdict:
    """Judges each step by its loss and gradient norm, the same way on all ranks; the update of a bad one is left out.

    It keeps a few bytes per layer and sample of a step, whatever the size of the model: recurrent states are not kept.

    Attributes:
        losses: of the step's micro-batches on this rank so far.
        finite: (P, L, B) bool of each micro-batch: whether the P parts of each layer's state are finite at the end of
            each sample.
        loss: (), mean of the step over micro-batches and ranks; None before `judge`.
        text: (2,), predicted tokens of the step over micro-batches and ranks, and the bytes of their text; None before
            `judge`, or where no text was recorded.
        bad: () bool, whether the step's update is left out; None before `judge`.
        skipped: () float32, updates that were left out so far; None before the first step.
        stops: () float32, how many ranks have called `ask_to_stop`; None before `judge`.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.finite: list[Tensor] = []
        self.loss: Tensor | None = None
        self.text: Tensor | None = None
        self.bad: Tensor | None = None
        self.skipped: Tensor | None = None
        self._stop_asked = False
        self.stops: Tensor | None = None
        self._limit = math.inf
        self._skipped_before = 0
        self._texts: list[Tensor] = []  # of the step's micro-batches on this rank so far
        self._finite_gradient: Tensor | None = None  # () bool, on all ranks; None: only known after the step

    def set_limit(self, loss: float) -> None:
        """From now on a step with a larger loss is bad."""
        self._limit = loss

    def ask_to_stop(self) -> None:
        """This rank asks all of them to stop: `stops` counts it from the next `judge` on."""
        self._stop_asked = True

    def count_skipped_from(self, skipped: int) -> None:
        """Sets how many updates were left out before the next step, at a resume or a rewind."""
        self._skipped_before = skipped
        if self.skipped is not None:
            self.skipped.fill_(skipped)

    def begin_step(self, device: torch.device) -> None:
        """Before the first micro-batch of a step."""
        self.bad = self.loss = self.text = None
        self.losses, self.finite, self._texts = [], [], []
        if self.skipped is None:
            self.skipped = torch.full((), float(self._skipped_before), device=device)

    def record_microbatch(self, loss: Tensor, state: State, text: Tensor | None = None) -> None:
        """After the forward pass of a micro-batch.

        Args:
            loss: ().
            state: at the end of its samples.
            text: (2,), its predicted tokens and the bytes of their text.
        """
        self.losses.append(loss.detach())
        self.finite.append(state.finite(EVIDENCE_BYTES))
        if text is not None:
            self._texts.append(text)

    def judge(self, norm: Tensor | None) -> Tensor:
        """Whether the step is bad, () bool, the same on all ranks; called before the optimiser's step.

        Args:
            norm: (), of the gradient over all ranks; None: only known after the step, and the strategy itself leaves
                out an update whose gradient is not finite.
        """
        loss = self.losses[0] if len(self.losses) == 1 else torch.stack(self.losses).mean()
        text = torch.stack(self._texts).sum(0).to(loss) if self._texts else loss.new_zeros(0)
        finite = None if norm is None else norm <= LARGEST_FINITE
        self.stops = loss.new_full((), float(self._stop_asked))
        if dist.is_initialized():
            sums = torch.stack([loss, torch.ones_like(loss) if finite is None else finite.to(loss), *text, self.stops])
            dist.all_reduce(sums)
            (loss, share), text, self.stops = (sums[:2] / dist.get_world_size()).unbind(), sums[2:-1], sums[-1]
            finite = None if finite is None else share == 1
        self.text = text if self._texts else None
        self.loss, self._finite_gradient = loss, finite
        below = loss <= min(self._limit, LARGEST_FINITE)  # false of NaN
        self.bad = ~below if finite is None else ~(below & finite)
        return self.bad

    def after_step(self, norm: Tensor) -> Tensor:
        """After the optimiser's step: counts an update that was left out.

        Args:
            norm: (), of the step's gradient.

        Returns:
            the norm; NaN where it is not finite on some rank.
        """
        assert self.bad is not None
        assert self.skipped is not None
        if self._finite_gradient is None:
            self.bad = self.bad | ~(norm.to(self.bad.device) <= LARGEST_FINITE)
        elif dist.is_initialized():
            norm = torch.where(self._finite_gradient, norm, math.nan)
        self.skipped = self.skipped + self.bad
        return norm


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
