"""Is every engine built, and is it right? What `rwkv-train doctor` shows of the operators."""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from rwkv_train.errors import UserError
from rwkv_train.ops import library, reference
from rwkv_train.ops.build import CPP, BuildError, Engine
from rwkv_train.ops.build_cuda import CUDA


@dataclass(frozen=True)
class EngineReport:
    """What `rwkv-train doctor` says about one engine.

    Attributes:
        ready: it is loaded, and the self-test passed.
        where: the library, or the definition's file; None when there is none.
        problem: why it is not ready, in one line; None when it is.
        remedy: what to type against the problem.
        error_ratio: self-test error against the float64 definition, in units of what the float32 definition has.
        seconds: what loading (and building, where needed) and the self-test took.
    """

    name: Literal["reference", "cpp", "cuda"]
    ready: bool
    where: str | None
    problem: str | None
    remedy: str | None
    error_ratio: float | None
    seconds: float


def engines() -> list[EngineReport]:
    """Builds, loads and self-tests every engine; never raises and never warns."""
    reports = [EngineReport("reference", True, reference.__file__, None, None, 1.0, 0.0), _examine("cpp", CPP)]
    return [*reports, _examine("cuda", CUDA)] if torch.cuda.is_available() else reports


def _examine(name: Literal["cpp", "cuda"], engine: Engine) -> EngineReport:
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with contextlib.suppress(UserError):
            engine.load()
    ratio, problem, remedy = None, None, None
    if engine.library is None:
        failure = engine.error or BuildError("it was not built", "rwkv-train doctor")
        problem, remedy = failure.why, failure.command
    else:
        ratio = _self_test("cuda" if name == "cuda" else "cpu")
        if not ratio <= 3.0:
            problem = f"its results are wrong: error {ratio:.1f} times the definition's"
            remedy = (
                "RWKV_OPS=reference trains correctly meanwhile; please report this machine's compiler and processor"
            )
    where = None if engine.library is None else str(engine.library)
    return EngineReport(name, problem is None, where, problem, remedy, ratio, time.perf_counter() - start)


def _self_test(device: str) -> float:
    """Largest error of the engine's wkv4 and gradients against float64, relative to the float32 definition's."""
    generator = torch.Generator().manual_seed(0)
    B, T, C = 2, 70, 40
    shapes = [(C,), (C,), (B, T, C), (B, T, C)]
    w, u, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    truth = [-torch.exp(w), u, 5 * k, v, reference.initial_state(k)]
    results = []
    for dtype, engine in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        inputs = [x.to(dtype).to(device if engine else "cpu").requires_grad_() for x in truth]
        outputs = torch.ops.rwkv_train.wkv4(*inputs, library.CHUNK)[:2] if engine else reference.wkv4(*inputs)
        grads = torch.autograd.grad(outputs[0].square().sum(), inputs)
        results.append([x.detach().cpu().double() for x in (*outputs, *grads)])
    exact, definition, ours = results
    ratios: list[float] = []
    for a, b, c in zip(exact, definition, ours, strict=True):
        floor = torch.finfo(torch.float32).eps * a.abs().clamp(max=1e30).max()
        ratios.append(((c - a).norm() / ((b - a).norm() + floor)).item())
    return max(ratios)
