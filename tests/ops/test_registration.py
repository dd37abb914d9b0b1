"""How operators are declared: what each library registers, what runs on a GPU, and the constants shared with cuda/."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_train.ops import build, reference
from rwkv_train.ops.families import FAMILIES
from rwkv_train.ops.registration import elementwise, wkv4
from rwkv_train.ops.registration.declaration import KERNELS
from rwkv_train.ops.registration.wkv4 import CHUNK, segments_on
from tests.ops.cases import wkv4_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_library_registers_every_operator_of_its_family(family: str) -> None:
    assert FAMILIES[family].cpp.load()
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in KERNELS[family] if not registered(f"rwkv_train::{name}", "CPU")] == []


def test_every_family_is_declared_and_has_its_sources() -> None:
    assert list(KERNELS) == list(FAMILIES)
    for family in FAMILIES.values():
        for source in (*family.cpp.sources, *(family.cuda.sources if family.cuda else ())):
            assert (build.source_directory() / source).is_file(), source


def constant(file: str, name: str) -> int:
    (found,) = re.findall(rf"\b{name} = (\d+)\b", (build.source_directory() / file).read_text())
    return int(found)


def test_constants_are_those_of_the_kernels() -> None:
    assert constant("kernels.h", "RWKV_CHUNK") == CHUNK
    assert 2 * constant("wkv4.cuh", "LANES") == wkv4.COLUMN  # a thread owns two channels


def test_which_kernel() -> None:
    assert segments_on(64, 1024, 4096, 132) == 0  # its channels fill the GPU
    assert segments_on(8, 1024, 2048, 132) == 1  # 256 blocks for 132 multiprocessors
    assert segments_on(1, 16384, 1024, 132) == 16  # 16 columns: two blocks each
    assert segments_on(1, 1023, 64, 132) == 1  # too short to cut
    assert segments_on(1, 262145, 64, 132) == 256  # no segment is shorter than 16 chunks


@pytest.mark.parametrize("T", [64, 1024, 4096, 65536])
@pytest.mark.parametrize("C", [64, 768, 1024, 2048, 5120])
@pytest.mark.parametrize("B", [1, 2, 8, 32])
def test_segments_cost_little_memory(B: int, T: int, C: int) -> None:
    """Saved states and scratch of the backward pass, in (B, T, C) float32 tensors: at most a sixteenth."""
    segments = segments_on(B, T, C, 132)
    saved, scratch = 3 * ((T - 1) // CHUNK), 10 * segments if segments > 1 else 2
    assert (saved + scratch) / T <= 1 / 16


class Operators:
    """In place of torch.ops.rwkv_train: notes which operators are called, and with what last argument."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, arguments[-1]))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The calls that reach a CUDA engine, which counts as loaded on a GPU with 132 multiprocessors."""
    loaded: Any = SimpleNamespace(device="cuda", load=lambda: True)
    for name, family in FAMILIES.items():
        monkeypatch.setitem(FAMILIES, name, replace(family, cuda=loaded))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    operators = Operators()
    monkeypatch.setattr(torch.ops, "rwkv_train", operators)
    return operators.calls


def test_on_a_gpu_the_engine_runs_where_there_are_no_starts(called: list[tuple[str, Any]]) -> None:
    with FakeTensorMode():
        w, u, k, state = (torch.empty(shape, device="cuda") for shape in ((64,), (64,), (1, 4096, 64), (1, 3, 64)))
        mixes, saved = [torch.empty(64, device="cuda")], torch.empty(1, 63, 3, 64, device="cuda")
        KERNELS["wkv4"]["wkv4"](w, u, k, k, state, None, CHUNK)
        KERNELS["wkv4"]["wkv4_backward"](w, u, k, k, state, None, saved, k, None, CHUNK)
        KERNELS["elementwise"]["shift_mix"](k, None, mixes, None)
        KERNELS["elementwise"]["shift_mix_backward"](k, None, mixes, None, [k])
        KERNELS["elementwise"]["relu_squared"](k)
        with pytest.raises(ValueError, match="saves a state every 64 steps, not 32"):
            KERNELS["wkv4"]["wkv4"](w, u, k, k, state, None, 32)
    names = ["wkv4_in_segments", "wkv4_in_segments_backward", "shift_mix_one_document"]
    assert [name for name, _ in called] == [*names, "shift_mix_one_document_backward", "relu_squared"]
    assert [last for _, last in called[:2]] == [segments_on(1, 4096, 64, 132)] * 2


def test_on_a_gpu_the_definition_runs_where_there_are_starts(
    called: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which function runs; the next test has the values. A torch without CUDA cannot index a fake tensor on a GPU."""
    ran: list[str] = []
    for module, name in ((wkv4, "_forward"), (wkv4, "_backward"), (elementwise, "_shift_mix_backward")):
        monkeypatch.setattr(module, name, lambda *arguments, name=name: ran.append(name))
    monkeypatch.setattr(reference, "shift_mix", lambda *arguments: ran.append("shift_mix"))
    with FakeTensorMode():
        w, k, state = (torch.empty(shape, device="cuda") for shape in ((4,), (1, 3, 4), (1, 3, 4)))
        starts = torch.empty(1, 3, dtype=torch.bool, device="cuda")
        KERNELS["wkv4"]["wkv4"](w, w, k, k, state, starts, CHUNK)
        KERNELS["wkv4"]["wkv4_backward"](w, w, k, k, state, starts, state, k, None, CHUNK)
        KERNELS["elementwise"]["shift_mix"](k, None, [w], starts)
        KERNELS["elementwise"]["shift_mix_backward"](k, None, [w], starts, [k])
    assert ran == ["_forward", "_backward", "shift_mix", "_shift_mix_backward"]
    assert called == []


def test_the_values_that_a_gpu_computes_where_there_are_starts() -> None:
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[:, [0, 8]] = starts[1, 13] = True
    w, u, k, v, before = (x.float() for x in wkv4_inputs(2, 20, 12))
    y, state, saved = wkv4._forward_on_cuda(w, u, k, v, before, starts, 8)
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v, before)]
    expected = partial(reference.wkv4, starts=starts)(*leaves)
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])
    gy, gstate = torch.ones_like(y), torch.ones_like(state)
    ours = wkv4._backward_on_cuda(w, u, k, v, before, starts, saved, gy, gstate, 8)
    right: tuple[Tensor, ...] = torch.autograd.grad((expected[0].sum() + expected[1].sum()), leaves)
    for mine, other in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    x, mixes = torch.randn(2, 20, 12), [torch.rand(12), torch.rand(12)]
    mixed = elementwise._shift_mix_on_cuda(x, None, mixes, starts)
    assert torch.equal(mixed[1], reference.shift_mix(x, None, mixes, starts)[1])
