"""Is every engine built, and are its results right? What `rwkv-train doctor` shows of the operators."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_train.errors import UserError
from rwkv_train.ops import reference
from rwkv_train.ops.build import BuildError, Engine
from rwkv_train.ops.families import FAMILIES, cuda_engines
from rwkv_train.ops.registration import SELF_TEST_CASES
from rwkv_train.ops.registration.declaration import SelfTestCase

MAX_ERROR_RATIO = 3.0  # of an engine's error to that of the definition in the same dtypes


@dataclass(frozen=True)
class EngineReport:
    """The result that `rwkv-train doctor` prints for the definition, or for an engine's library of one operator family.

    Attributes:
        name: "reference", or engine and family, as "cpp wkv4".
        ready: it is loaded, and the self-test passed.
        where: the library's path, or the definition's file; None when there is none.
        problem: why it is not ready, in one line; None when it is.
        remedy: what to type against the problem; None when there is none.
        error_ratio: the largest self-test error against the float64 definition, in units of the error that the
            definition has in the same dtypes; None when the self-test did not end.
        seconds: duration of loading (and building, where needed) and of the self-test.
    """

    name: str
    ready: bool
    where: str | None
    problem: str | None
    remedy: str | None
    error_ratio: float | None
    seconds: float


def engines() -> list[EngineReport]:
    """Builds, loads and self-tests every engine for this machine's devices; never raises and never warns."""
    reports = [EngineReport("reference", True, reference.__file__, None, None, 1.0, 0.0)]
    reports += [_examine(family.cpp) for family in FAMILIES.values()]
    if torch.cuda.is_available():
        reports += [_examine(engine) for engine in cuda_engines().values()]
    return reports


def _examine(engine: Engine) -> EngineReport:
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
        ratio, problem = _judge(engine)
        if problem is not None:
            remedy = (
                "RWKV_OPS=reference trains correctly meanwhile; please report this machine's compiler and processor"
            )
    where = None if engine.library is None else str(engine.library)
    seconds = time.perf_counter() - start
    return EngineReport(f"{engine.name} {engine.family}", problem is None, where, problem, remedy, ratio, seconds)


def _judge(engine: Engine) -> tuple[float | None, str | None]:
    """The largest error ratio, and the problem in one line; None when the engine is right."""
    try:
        ratio, result = worst_error(engine)
    except RuntimeError as error:  # of a check in the engine, or of the device
        return None, f"its self-test failed: {next(iter(str(error).splitlines()), type(error).__name__)}"
    if ratio <= MAX_ERROR_RATIO:
        return ratio, None
    return ratio, f"its results are wrong: error {ratio:.1f} times the definition's in {result}"


def worst_error(engine: Engine) -> tuple[float, str]:
    """The largest error ratio of all results of a loaded engine, and the result that has it.

    Every self-test case of the engine's family runs in every dtype of the engine; compared are all outputs, and the
    gradient of a weighted sum of them for each input.
    """
    ratios = {
        f"{result} of {case.name} in {str(dtype).removeprefix('torch.')}": ratio
        for case in SELF_TEST_CASES[engine.family]
        if case.device in (None, engine.device)
        for dtype in engine.dtypes
        for result, ratio in _error_ratios(case, dtype, engine.device).items()
    }
    result = max(ratios, key=lambda name: ratios[name])
    return ratios[result], result


def _error_ratios(case: SelfTestCase, dtype: torch.dtype, device: str) -> dict[str, float]:
    inputs = case.inputs()
    starts = None if case.starts is None else case.starts()
    dtypes = [dtype if name in case.stored else torch.float32 for name in inputs]
    values = [x.to(kind).double() for x, kind in zip(inputs.values(), dtypes, strict=True)]  # exact in their dtype
    exact = _results(case.definition, starts, values)
    working = [x.to(kind) for x, kind in zip(values, dtypes, strict=True)]
    definition = _results(case.definition, starts, working)
    on_device = None if starts is None else starts.to(device)
    ours = _results(case.operator, on_device, [x.to(device) for x in working])
    names = [*case.outputs, *(f"the gradient of {name}" for name in inputs)]
    return dict(zip(names, map(_error_ratio, exact, definition, ours), strict=True))


def _results(
    operator: Callable[..., Sequence[Tensor]], starts: Tensor | None, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, and the gradient of a fixed weighted sum of them all for every input; on the CPU."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = operator(starts, *leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]  # exact in every dtype
    return [x.detach().cpu() for x in (*outputs, *torch.autograd.grad(outputs, leaves, weights))]


def _error_ratio(exact: Tensor, definition: Tensor, ours: Tensor) -> float:
    """Error of ours in units of the definition's, or of one float32 rounding where that is larger; inf for NaN."""
    rounding = torch.finfo(torch.float32).eps * exact.norm()
    unit = torch.maximum((definition.double() - exact).norm(), rounding)
    ratio = ((ours.double() - exact).norm() / unit).item()
    return ratio if math.isfinite(ratio) else math.inf
