"""The CUDA kernels in the emulator: values against float64, every order of threads, and what the detectors report.

The long form, with every dtype, cut and length, is marked `kernels` and runs by `make test-kernels`.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_train.ops import reference
from rwkv_train.ops.families import FAMILIES
from rwkv_train.ops.registration.wkv4 import CHUNK
from tests.ops.cases import assert_as_good_as, value_and_gradients, wkv4_inputs
from tests.ops.emulator import loader, proof
from tests.ops.emulator.loader import Kernels

ORDERS = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]
BOUND = 4  # units of ε times the condition, as docs/kernels.md derives it
ROOT = Path(__file__).resolve().parents[2]
NORESERVE = 0x4000  # Linux's; Python's mmap names it from 3.13 on
UNTOUCHED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE  # addresses, no memory until it is written


@pytest.fixture(scope="module")
def plain() -> Kernels:
    return loader.load("plain")


@pytest.fixture(scope="module")
def check() -> Kernels:
    return loader.load("check")


def wkv4_case(
    B: int, T: int, C: int, dtype: torch.dtype, seed: int = 3, k_scale: float = 2.0, decay: float = 0.0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs that are exact in their storage, and gradients of y and of the new state; all float64."""
    inputs = [x.float().double() for x in wkv4_inputs(B, T, C, k_scale, decay, seed)]
    inputs[2:4] = [x.to(dtype).double() for x in inputs[2:4]]
    generator = torch.Generator().manual_seed(seed + 1)
    gy, gstate = (torch.randn(shape, generator=generator) for shape in ((B, T, C), (B, 3, C)))
    return inputs, gy.to(dtype).double(), gstate.double()


def error_ratios(
    kernels: Kernels,
    shape: tuple[int, int, int],
    segments: int,
    dtype: torch.dtype,
    with_state: bool = True,
    **values: float,
) -> dict[str, float]:
    """Largest error of each result in units of ε · condition."""
    inputs, gy, gstate = wkv4_case(*shape, dtype, **values)  # type: ignore[arg-type]
    of_state = gstate if with_state else None
    found = proof.wkv4(kernels, inputs, gy, of_state, segments, dtype)
    exact, condition = proof.truth(inputs, gy, of_state), proof.conditions(inputs, gy, of_state)
    return proof.worst(found, exact, condition, dtype)


def assert_bound(*case: Any, **values: Any) -> dict[str, float]:
    ratios = error_ratios(*case, **values)
    assert all(ratio <= BOUND for ratio in ratios.values()), ratios
    return ratios


@pytest.mark.parametrize("segments", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", list(proof.DTYPES))
def test_wkv4_is_right(plain: Kernels, dtype: torch.dtype, segments: int) -> None:
    plain.schedule()
    for shape in [(1, 1, 1), (2, 15, 3), (1, 17, 6), (1, 63, 70), (2, 130, 4), (1, 193, 66)]:
        if segments <= -(-shape[1] // CHUNK):
            assert_bound(plain, shape, segments, dtype, with_state=shape[0] == 2 or segments == 3)


@pytest.mark.parametrize("segments", [0, 1, 3])
def test_wkv4_at_the_edge(plain: Kernels, segments: int) -> None:
    """Keys that overflow any sum without a maximum, decays from none to at once."""
    plain.schedule()
    for values in ({"k_scale": 40.0}, {"decay": -12.0}, {"decay": 3.0}, {"decay": 12.0}):
        assert_bound(plain, (1, 150, 4), segments, torch.float32, **values)


@pytest.mark.parametrize("segments", [0, 1, 2])
@pytest.mark.parametrize("far", [-41.0, -39.0, 39.0, 41.0])
def test_wkv4_on_both_sides_of_where_y_needs_weights_of_its_own(plain: Kernels, far: float, segments: int) -> None:
    """|u + w| below 40, and above."""
    plain.schedule()
    inputs, gy, _ = wkv4_case(1, 150, 4, torch.float32)
    inputs[1] = (far - inputs[0]).float().double()
    found = proof.wkv4(plain, inputs, gy, None, segments)
    exact, condition = proof.truth(inputs, gy, None), proof.conditions(inputs, gy, None)
    ratios = proof.worst(found, exact, condition, torch.float32)
    assert all(ratio <= BOUND for ratio in ratios.values()), ratios


def test_wkv4_with_a_tie_and_without_a_state(plain: Kernels) -> None:
    """With w = 0 and constant k every step ties with the past; torch.maximum gives each side half."""
    plain.schedule()
    (w, u, k, v, state), gy, gstate = wkv4_case(1, 130, 4, torch.float32)
    for start in (0 * state + 1, reference.initial_state(k)):
        inputs = [0 * w, u, 0 * k + 1, v, start]
        for segments in (0, 1, 2):
            found, exact = proof.wkv4(plain, inputs, gy, gstate, segments), proof.truth(inputs, gy, gstate)
            for name, ours in found.items():
                scale = exact[name].abs().clamp(max=1e30).amax()
                ours, right = ours.clamp(min=-1e30), exact[name].clamp(min=-1e30)
                assert (ours - right).abs().max() <= 1e-4 * scale, (segments, name)


def elementwise(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int, int], with_previous: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
    """shift_mix with three mixes, relu_squared and sigmoid_gate by the kernels, by the definition, and the truth."""
    B, T, C = shape
    kind, n = proof.DTYPES[dtype], B * T * C
    generator = torch.Generator().manual_seed(5)
    x, r = (torch.randn(shape, generator=generator).to(dtype).double() for _ in range(2))
    previous = torch.randn(B, C, generator=generator).to(dtype).double()
    mixes = [torch.rand(C, generator=generator).double() for _ in range(3)]
    inputs = [x, *([previous] if with_previous else []), *mixes, 4 * r]
    dtypes = [dtype] * (1 + with_previous) + [torch.float32] * 3 + [dtype]

    def definition(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        before, weights, r = (rest[0] if with_previous else None), rest[-4:-1], rest[-1]
        return (*reference.shift_mix(x, before, weights), reference.relu_squared(x), reference.sigmoid_gate(r, x))

    def by_kernels(x: Tensor, *rest: Tensor) -> list[Tensor]:
        before, weights, r = (rest[0] if with_previous else None), rest[-4:-1], rest[-1]
        given = proof.buffer(kernels, "x", x, dtype)
        first = None if before is None else proof.buffer(kernels, "previous", before, dtype)
        mu = [proof.buffer(kernels, "mix", mix) for mix in weights]
        out = [proof.unwritten(kernels, "out", shape, dtype) for _ in weights]
        kernels.call("rwkv_shift_mix", kind, B, T, C, 3, given, first, mu, out, None)
        h, o = (proof.unwritten(kernels, name, shape, dtype) for name in ("h", "o"))
        gate = proof.buffer(kernels, "r", r, dtype)
        kernels.call("rwkv_relu_squared", kind, n, given, h, None)
        kernels.call("rwkv_sigmoid_gate", kind, n, gate, given, o, None)
        values = [proof.value(y, dtype) for y in (*out, h, o)]
        # The gradient of a fixed weighted sum, as cases.value_and_gradients has it.
        draws = torch.Generator().manual_seed(7)
        g = [proof.buffer(kernels, "g", torch.randn(shape, generator=draws), dtype) for _ in range(5)]
        dx, dh, dr, dy = (proof.unwritten(kernels, name, shape, dtype) for name in ("dx", "dk", "dr", "dy"))
        dprevious = proof.unwritten(kernels, "dprevious", (B, C), dtype)
        dmix = [proof.unwritten(kernels, "dmix", (C,)) for _ in weights]
        scratch = proof.unwritten(kernels, "scratch", (B * -(-T // 64) * 3 * C,))
        kernels.call(
            *("rwkv_shift_mix_backward", kind, B, T, C, 3, given, first, mu, g[:3], dx, dprevious, dmix, scratch, None)
        )
        kernels.call("rwkv_relu_squared_backward", kind, n, h, g[3], dh, None)
        kernels.call("rwkv_sigmoid_gate_backward", kind, n, gate, given, g[4], dr, dy, None)
        gradients = [proof.value(dx, dtype) + proof.value(dh, dtype) + proof.value(dy, dtype)]
        gradients += [proof.value(dprevious, dtype)] if with_previous else []
        return [*values, *gradients, *(proof.value(m) for m in dmix), proof.value(dr, dtype)]

    ours = by_kernels(*inputs)
    working = value_and_gradients(definition, inputs, dtypes)
    return ours, working, value_and_gradients(definition, inputs, [torch.float64] * len(inputs)), 5


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 7), (2, 65, 132), (1, 130, 36)])
@pytest.mark.parametrize("dtype", list(proof.DTYPES))
def test_elementwise_kernels_are_right(plain: Kernels, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    plain.schedule()
    for with_previous in (False, True):
        ours, definition, truth, outputs = elementwise(plain, dtype, shape, with_previous)
        assert_as_good_as(ours, definition, truth, outputs, torch.finfo(dtype).eps)


def everything(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    """All results of every kernel, for comparing orders bit by bit."""
    results: list[Tensor] = []
    inputs, gy, gstate = wkv4_case(1, 200, 66, dtype)
    for segments, of_state in ((0, gstate), (0, None), (1, None), (3, gstate), (3, None)):
        results += proof.wkv4(kernels, inputs, gy, of_state, segments, dtype).values()
    return results + elementwise(kernels, dtype, (2, 70, 36), True)[0]


def test_every_order_of_threads_gives_the_same_bits(plain: Kernels) -> None:
    results = []
    for order in ORDERS:
        plain.schedule(*order)
        results.append(everything(plain, torch.bfloat16))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_race_and_no_access_out_of_bounds(check: Kernels) -> None:
    """The shadow memory checks every load and store, of the kernels for even and for odd C."""
    for order in (ORDERS[0], ORDERS[2]):
        check.schedule(*order)
        for shape, dtype in (((1, 200, 66), torch.bfloat16), ((2, 130, 3), torch.float32)):
            inputs, gy, gstate = wkv4_case(*shape, dtype)
            for segments, of_state in ((0, None), (1, gstate), (3, None)):
                proof.wkv4(check, inputs, gy, of_state, segments, dtype)
            elementwise(check, dtype, (*shape[:2], 68) if shape[2] % 2 == 0 else shape, with_previous=True)


def test_elements_beyond_two_to_the_31(plain: Kernels) -> None:
    """Only the last block of a grid runs, on buffers of reserved addresses: its rows are beyond 2^31 elements."""
    plain.schedule()
    B, T, C = 33_000, 64, 1024  # 2.16e9 elements
    elements = B * T * C
    assert elements > 2**31
    maps = [mmap.mmap(-1, 2 * elements, UNTOUCHED) for _ in range(3)]
    k, v, y = ((ctypes.c_uint16 * elements).from_buffer(x) for x in maps)
    last = slice((elements - C) - (T - 1) * C, elements)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(T, C, generator=generator).bfloat16() for _ in range(2)]
    for memory, draw in zip((k, v), draws, strict=True):
        ctypes.memmove(ctypes.addressof(memory) + 2 * last.start, draw.view(torch.int16).numpy().ctypes.data, 2 * T * C)
    state = reference.initial_state(torch.empty(1, 1, C)).expand(B, 3, C)[-1:].contiguous()
    states = mmap.mmap(-1, 4 * B * 3 * C, UNTOUCHED)
    new_states = mmap.mmap(-1, 4 * B * 3 * C, UNTOUCHED)
    first, final = ((ctypes.c_float * (B * 3 * C)).from_buffer(x) for x in (states, new_states))
    ctypes.memmove(ctypes.addressof(first) + 4 * (B - 1) * 3 * C, state.numpy().ctypes.data, 4 * 3 * C)
    w, u = -torch.rand(C, generator=generator), torch.randn(C, generator=generator)
    launcher = plain.library.rwkv_wkv4_forward
    launcher.restype = ctypes.c_char_p
    keys, values = (x.double()[None] for x in draws)
    exact, _ = reference.wkv4(w.double(), u.double(), keys, values, state.double())
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (w, u)]
    pointers += [ctypes.c_void_p(ctypes.addressof(x)) for x in (k, v, first, y, final)]
    for segments, blocks in ((0, 8), (1, 16)):  # of 64 threads of two channels; of 64 channels
        plain.library.emu_last_blocks(blocks)
        try:
            sizes = [ctypes.c_int64(n) for n in (B, T, C, segments)]
            assert launcher(1, *sizes, *pointers, None, None, None) is None, plain.library.emu_error()
        finally:
            plain.library.emu_last_blocks(2**63)
        text = ctypes.string_at(ctypes.addressof(y) + 2 * last.start, 2 * T * C)
        ours = torch.frombuffer(bytearray(text), dtype=torch.bfloat16).view(T, C).double()
        assert (ours - exact[0]).abs().max() <= 2.0**-8 * exact.abs().max()
        ctypes.memset(ctypes.addressof(y) + 2 * last.start, 0, 2 * T * C)
    del k, v, y, first, final


def test_launchers_refuse_what_they_cannot_do(plain: Kernels) -> None:
    buffers: list[None] = [None] * 9
    for sizes, message in (
        ((1, 0, 4, 1), "at least 1"),
        ((1, 64, 4, 2), "segments"),
        ((1, 64, 4, -1), "segments"),
        ((2**31, 64, 64, 1), "more blocks than a grid has"),
        ((1, 2**38, 1, 0), "beyond 2^37"),
    ):
        with pytest.raises(loader.EmulatorError, match=message.replace("^", r"\^")):
            plain.call("rwkv_wkv4_forward", 0, *sizes, *buffers, None)


# ---- the long form ------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", list(proof.DTYPES))
@pytest.mark.parametrize("C", [1, 2, 31, 64, 65, 130])
def test_wkv4_over_many_shapes(plain: Kernels, C: int, dtype: torch.dtype) -> None:
    worst = 0.0
    for number, T in enumerate([1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 321]):
        plain.schedule(*ORDERS[number % len(ORDERS)])
        for segments in {0, 1, 2, -(-T // 64)}:
            if segments <= -(-T // 64):
                ratios = assert_bound(
                    plain, (1 + number % 2, T, C), segments, dtype, with_state=number % 3 > 0, seed=number
                )
                worst = max(worst, *ratios.values())
    print(f"C {C} {dtype}: worst error {worst:.2f} ε × condition")


@pytest.mark.kernels
@pytest.mark.timeout(600)
@pytest.mark.parametrize("T", [65535, 65537, 262145])
def test_wkv4_at_lengths_where_others_fail(plain: Kernels, T: int) -> None:
    """Against the C++ engine, which is another program: its float32 errors count as the definition's."""
    assert FAMILIES["wkv4"].cpp.load()
    plain.schedule()
    inputs, gy, gstate = wkv4_case(1, T, 2, torch.float32, decay=-4.0)
    w, u, k, v, state = (x.float() for x in inputs)
    y, new_state, saved = torch.ops.rwkv_train.wkv4(w, u, k, v, state, None, CHUNK)
    backward = torch.ops.rwkv_train.wkv4_backward
    gradients = backward(w, u, k, v, state, None, saved, gy.float(), gstate.float(), CHUNK)
    theirs = dict(zip(proof.WKV4, (y, new_state, *gradients), strict=True))
    for segments in (0, 1, 40, T // 64 // 16):
        for name, ours in proof.wkv4(plain, inputs, gy, gstate, segments).items():
            other = theirs[name].double()
            assert (ours - other).norm() <= 2e-5 * other.norm(), (segments, name)


@pytest.mark.kernels
def test_no_access_out_of_bounds_by_the_address_sanitizer() -> None:
    program = (
        "import torch; from tests.ops.emulator import loader; from tests.ops import test_cuda_kernels as t\n"
        "kernels = loader.load('asan')\n"
        "for dtype in (torch.float32, torch.float16): t.everything(kernels, dtype)\n"
        "print('clean')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=loader.asan_environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == "clean", done.stderr[-3000:]


@pytest.mark.kernels
@pytest.mark.timeout(900)
def test_every_planted_error_is_caught() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "kernel_mutants.py"], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
