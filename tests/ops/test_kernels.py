"""The C++ kernels on guarded memory, and a check of the checks: a kernel with a wrong sign fails."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_train.ops import build, reference
from tests.ops.cases import assert_as_good_as, value_and_gradients, wkv4_inputs

GUARD, SENTINEL = 32, 12345.0  # floats on either side of every tensor


def compile_kernels(directory: Path, source: str = "", old: str = "", new: str = "") -> ctypes.CDLL:
    """The kernels as a library of C functions; `old` in file `source` is replaced by `new` first."""
    for path in (*build.source_directory().glob("*.*"), Path(__file__).with_name("shim.cpp")):
        shutil.copy(path, directory)
    if old:
        text = (directory / source).read_text()
        assert text.count(old) == 1, f"{source} has {old!r} {text.count(old)} times"
        (directory / source).write_text(text.replace(old, new))
    flags = build.FLAGS.replace("-fvisibility=hidden", "").replace("-O3", "-O1").split()
    command = [build.find_compiler(), *flags, "-shared", str(directory / "shim.cpp"), "-o", str(directory / "shim.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(directory / "shim.so"))


class Guarded:
    """Tensors between sentinels; outputs are NaN until they are written."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.views: list[Tensor] = []

    def add(self, *shape: int, value: Tensor | None = None) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * GUARD,), SENTINEL)
        view = buffer[GUARD : GUARD + count].view(shape)
        view.copy_(torch.full(shape, torch.nan) if value is None else value)
        self.buffers.append(buffer)
        self.views.append(view)
        return view

    def pointers(self) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * len(self.views))(*(view.data_ptr() for view in self.views))

    def assert_unharmed(self) -> None:
        for buffer in self.buffers:
            assert (buffer[:GUARD] == SENTINEL).all(), "written before the beginning"
            assert (buffer[-GUARD:] == SENTINEL).all(), "written past the end"


def call(function: Callable[..., Any], guarded: Guarded, *shape: int) -> None:
    function((ctypes.c_int64 * len(shape))(*shape), guarded.pointers())
    guarded.assert_unharmed()


def run_wkv4(kernels: ctypes.CDLL, inputs: Sequence[Tensor], chunk: int, width: int) -> list[Tensor]:
    """Outputs and gradients as value_and_gradients returns them, computed by the kernels on guarded memory."""
    w, u, k, v, state = inputs
    B, T, C = k.shape
    forward, backward = Guarded(), Guarded()
    for x in inputs:
        forward.add(*x.shape, value=x)
    y, new_state, saved = forward.add(B, T, C), forward.add(B, 3, C), forward.add(B, (T - 1) // chunk, 3, C)
    call(kernels.forward, forward, B, T, C, chunk, width)
    generator = torch.Generator().manual_seed(7)
    gy, gstate = torch.randn(y.shape, generator=generator), torch.randn(state.shape, generator=generator)
    for x in (w, u, k, v, state, saved, gy, gstate):
        backward.add(*x.shape, value=x)
    dk, dv, dw, du, dstate = (backward.add(*shape) for shape in (k.shape, v.shape, (B, C), (B, C), state.shape))
    call(kernels.backward, backward, B, T, C, chunk, width)
    return [x.double() for x in (y, new_state, dw.sum(0), du.sum(0), dk, dv, dstate)]


def check_wkv4(
    kernels: ctypes.CDLL, shape: tuple[int, int, int], chunk: int, width: int, k_scale: float = 2.0, decay: float = 0.0
) -> None:
    inputs, single = wkv4_inputs(*shape, k_scale, decay), [torch.float32] * 5
    truth = value_and_gradients(reference.wkv4, inputs, [torch.float64] * 5)
    definition = value_and_gradients(reference.wkv4, inputs, single)
    ours = run_wkv4(kernels, inputs, chunk, width)
    assert_as_good_as(ours, definition, truth, outputs=2, epsilon=torch.finfo(torch.float32).eps)


def check_mix(kernels: ctypes.CDLL, B: int, T: int, C: int) -> None:
    def operator(x: Tensor, previous: Tensor, *mixes: Tensor) -> list[Tensor]:
        return reference.shift_mix(x, previous, mixes)

    inputs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((B, T, C), (B, C), (C,), (C,))
    ]
    forward, backward = Guarded(), Guarded()
    for x in inputs:
        forward.add(*x.shape, value=x)
        backward.add(*x.shape, value=x)
    outputs = [forward.add(B, T, C), forward.add(B, T, C)]
    call(kernels.mix, forward, B, T, C)
    generator = torch.Generator().manual_seed(7)
    for y in outputs:
        backward.add(B, T, C, value=torch.randn(y.shape, generator=generator))
    dx, dprevious, dmix = backward.add(B, T, C), backward.add(B, C), backward.add(B * -(-T // 64), 2, C)
    call(kernels.mix_backward, backward, B, T, C)
    ours = [x.double() for x in (*outputs, dx, dprevious, *dmix.sum(0))]
    truth = value_and_gradients(operator, inputs, [torch.float64] * 4)
    definition = value_and_gradients(operator, inputs, [torch.float32] * 4)
    assert_as_good_as(ours, definition, truth, outputs=2, epsilon=torch.finfo(torch.float32).eps)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize(("B", "C", "chunk", "width"), [(1, 33, 64, 128), (2, 100, 16, 32), (3, 140, 7, 80)])
def test_wkv4_writes_its_outputs_and_nothing_else(
    kernels: ctypes.CDLL, B: int, T: int, C: int, chunk: int, width: int
) -> None:
    check_wkv4(kernels, (B, T, C), chunk, width)


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 63, 33), (2, 64, 16), (3, 130, 40)])
def test_mix_writes_its_outputs_and_nothing_else(kernels: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    check_mix(kernels, *shape)


def check_exponential(kernels: ctypes.CDLL) -> None:
    guarded, n = Guarded(), 200_000
    x = guarded.add(n, value=torch.linspace(-87.33, 0, n))
    y = guarded.add(n)
    call(kernels.exponential, guarded, n)
    exact = x.double().exp()
    ulp = torch.exp2(exact.log2().floor()) * 2.0**-23
    assert ((y.double() - exact).abs() / ulp).max() < 1


def test_the_exponential_is_right_within_one_ulp(kernels: ctypes.CDLL, tmp_path: Path) -> None:
    check_exponential(kernels)
    mutant = compile_kernels(tmp_path, "cpu.h", "p = p * r + 4.1668456e-2f;", "p = p * r + 4.166e-2f;")
    with pytest.raises(AssertionError):
        check_exponential(mutant)
    guarded = Guarded()
    guarded.add(5, value=torch.tensor([-87.4, -1e38, -torch.inf, torch.nan, 0.0]))
    y = guarded.add(5)
    call(kernels.exponential, guarded, 5)
    assert y[:3].eq(0).all()
    assert y[3].isnan()
    assert y[4] == 1


def check(kernels: ctypes.CDLL) -> None:
    check_wkv4(kernels, (2, 70, 24), 16, 32)
    check_wkv4(kernels, (2, 70, 24), 16, 32, k_scale=60, decay=4.5)  # y with a pair of its own
    check_mix(kernels, 2, 130, 24)


@pytest.mark.parametrize(
    ("source", "old", "new"),
    [
        ("wkv4_cpu.cpp", "Pair{next.x, next.y * bonus.factor[c]}", "Pair{next.x * bonus.factor[c], next.y}"),
        ("wkv4_cpu.cpp", "factor[c] = x < 0.0f ? e : 1.0f / e;", "factor[c] = e;"),
        ("wkv4_cpu.cpp", "constexpr float NEAR = 40.0f;", "constexpr float NEAR = 1e9f;"),
        ("wkv4_cpu.cpp", ": exp_pair(p, u[c] + k);", ": exp_pair(u[c] + k, p);"),
        ("wkv4_cpu.cpp", "gd[c] = next.x * gd[c] - out.x * g * y;", "gd[c] = next.x * gd[c] + out.x * g * y;"),
        ("wkv4_cpu.cpp", "q[c] -= won;", "q[c] += won;"),
        ("wkv4_cpu.cpp", "q[c] -= state.n[c] * gn[c] + state.d[c] * gd[c];", "q[c] += state.n[c] * gn[c];"),
        ("shift_mix_backward_cpu.cpp", "earlier += g - direct;", "earlier += g + direct;"),
        ("shift_mix_backward_cpu.cpp", "carry[c] += load(g[c]) - load(g[c]) * mix[c];", "carry[c] += load(g[c]);"),
    ],
)  # fmt: skip
def test_a_mutated_kernel_goes_red(tmp_path: Path, source: str, old: str, new: str) -> None:
    mutant = compile_kernels(tmp_path, source, old, new)
    with pytest.raises(AssertionError, match=r"result \d"):
        check(mutant)
