"""The CUDA engine without a GPU: toolkits that do not fit, architectures, the cache, ptxas on the kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rwkv_train import ops
from rwkv_train.cli.main import main
from rwkv_train.errors import UserError
from rwkv_train.ops import build, build_cuda
from rwkv_train.ops.build import BuildError, CppEngine
from rwkv_train.ops.build_cuda import CudaEngine
from rwkv_train.ops.families import FAMILIES, cuda_engines
from rwkv_train.ops.registration.declaration import KERNELS
from tests.ops.test_build import REPORT, start

try:
    NVCC: str | None = build_cuda.find_nvcc()
except BuildError:
    NVCC = None
with_nvcc = pytest.mark.skipif(NVCC is None, reason='no nvcc: pip install "nvidia-cuda-nvcc==13.*"')

# What docs/kernels.md assumes: registers of a thread at most, and bytes of shared memory, by kernel for 16-bit storage.
ASSUMED = {
    "wkv4_forward_kernel": (128, 13824),
    "wkv4_backward_kernel": (128, 19968),
    "wkv4_forward_sequential_kernel": (128, 0),
    "wkv4_backward_sequential_kernel": (168, 12288),
    "wkv4_starts_kernel": (64, 0),
    "wkv4_ends_kernel": (64, 0),
    "sum_rows_kernel": (64, 1024),
    "shift_mix_kernel": (128, 0),
    "shift_mix_backward_kernel": (128, 4096),
    "flat_kernel": (64, 0),
}

# In float32, where rows are twice as wide and registers hold them; blocks of a multiprocessor are then fewer.
IN_FLOAT32 = {
    "wkv4_backward_kernel": 255,
    "wkv4_forward_sequential_kernel": 160,
    "wkv4_backward_sequential_kernel": 255,
}


def fake_nvcc(folder: Path, version: str, compiles: str = "exit 1") -> Path:
    nvcc = folder / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) echo "release {version}, V{version}";; *) {compiles};; esac\n'
    )
    nvcc.chmod(0o755)
    return nvcc


def test_toolkits_that_do_not_fit() -> None:
    build_cuda.check_toolkit((13, 0), "13.0")
    build_cuda.check_toolkit((12, 8), "12.6")
    build_cuda.check_toolkit((13, 0), None)
    with pytest.raises(BuildError, match=r"nvcc is 11\.4, the kernels need 12\.0 or newer"):
        build_cuda.check_toolkit((11, 4), None)
    with pytest.raises(BuildError, match=r"nvcc is 13\.0 but this torch was built for CUDA 12\.6") as caught:
        build_cuda.check_toolkit((13, 0), "12.6")
    assert caught.value.command == "install a CUDA 12 toolkit, or a torch for CUDA 13"


def test_no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(BuildError, match=r"no CUDA compiler \(nvcc\) was found") as caught:
        build_cuda.find_nvcc()
    assert caught.value.command.startswith("pip install")


def test_architectures() -> None:
    assert build_cuda.parse_architectures("9.0, 8.0,9.0") == ("8.0", "9.0")
    for text, message in (("6.1", "older than 7.0"), ("sm_80", "no architecture"), ("8", "no architecture")):
        with pytest.raises(BuildError, match=message):
            build_cuda.parse_architectures(text)
    assert build_cuda.covers(("8.0", "9.0"), ("8.6",))
    assert build_cuda.covers(("8.0", "9.0"), ("12.0",))  # by the PTX of the newest
    assert not build_cuda.covers(("8.6",), ("8.0",))
    assert not build_cuda.covers(("8.0", "10.0"), ("9.0",))


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    with pytest.raises(BuildError, match=r"compute capability 6\.1 is older than 7\.0") as caught:
        build_cuda.local_architectures()
    assert "RWKV_OPS=reference" in caught.value.command


def test_without_a_gpu_a_demanded_engine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.SETTINGS, "required", "cuda")
    engine = CudaEngine("wkv4", cuda_engines()["wkv4"].sources)
    with pytest.raises(UserError, match=r"RWKV_OPS=cuda demands an engine that is not available: .*(CUDA|GPU)"):
        engine.load()


def test_a_demanded_engine_on_the_wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine, device, other in (("cuda", "cpu", "cpu"), ("cpp", "cuda", "cuda:0")):
        monkeypatch.setattr(ops, "ENGINE", engine)

        class Somewhere:
            dtype = torch.float32

        Somewhere.device = torch.device(other)  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=f"RWKV_OPS={engine} demands an engine for .*, and a tensor is on {device}"):
            ops._runs_by_definition(Somewhere())  # type: ignore[arg-type]


def test_float16_runs_where_there_is_no_engine_for_it() -> None:
    x = torch.randn(1, 3, 4, dtype=torch.float16)
    assert ops.relu_squared(x).dtype == torch.float16


def test_a_source_that_does_not_compile_shows_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(tmp_path, "13.0", "echo 'wkv4.cu(7): error: no such thing'; exit 2")
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: str(nvcc))
    with pytest.raises(BuildError, match=r"wkv4\.cu\(7\): error: no such thing") as caught:
        cuda_engines()["wkv4"].build(tmp_path / "cache", ("9.0",))
    assert "ninja -C" in caught.value.command
    monkeypatch.setattr(CppEngine, "build", lambda self, cache: Path("built"))
    assert main(["build-ops", "--arch", "9.0", "--cache", str(tmp_path / "cache")]) == 2
    assert main(["build-ops", "--arch", "5.0"]) == 2


def test_the_cache_can_be_put_anywhere(tmp_path: Path) -> None:
    process = start(REPORT, tmp_path, RWKV_OPS_CACHE=str(tmp_path / "elsewhere"))
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert str(tmp_path / "elsewhere") in output
    assert not (tmp_path / ".cache").exists()


@pytest.mark.kernels
@pytest.mark.timeout(600)
@with_nvcc
def test_built_ahead_into_one_library_for_several_architectures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-ops", "--arch", "8.0,9.0", "--cache", str(tmp_path)]) == 0
    libraries = [Path(line) for line in capsys.readouterr().out.split()]
    engines = [*(family.cpp for family in FAMILIES.values()), *cuda_engines().values()]
    assert [library.name for library in libraries] == [engine.library_name for engine in engines]
    assert all(library.exists() for library in libraries)
    for engine, library in zip(cuda_engines().values(), libraries[len(FAMILIES) :], strict=True):
        assert library.parent.name.endswith("-8.0-9.0")
        assert engine.build(tmp_path, ("8.6",)) == library, "a build for more architectures serves one of them"
        torch.ops.load_library(str(library))  # every symbol is there, and the schemas fit
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    own = {"wkv4": "wkv4_in_segments", "shift_mix": "shift_mix_one_document"}  # no starts in these kernels
    for family in cuda_engines():
        for name in KERNELS[family]:
            base, backward = name.removesuffix("_backward"), "_backward" if name.endswith("_backward") else ""
            assert registered(f"rwkv_train::{own.get(base, base)}{backward}", "CUDA"), name


@pytest.mark.kernels
@pytest.mark.timeout(600)
@with_nvcc
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_ptxas_spills_nothing_and_keeps_to_what_occupancy_assumes(architecture: str, tmp_path: Path) -> None:
    seen = set()
    for source in ("wkv4", "elementwise"):
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        target = [build.source_directory() / f"{source}.cu", "-o", tmp_path / f"{source}.cubin"]
        command = [NVCC, *build_cuda.NVCC_FLAGS.split(), code, "-Xptxas", "-v", "-cubin", *target]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for name, text in re.findall(r"entry function '(\w+)'[^\n]*\n((?:(?!entry function)[\s\S])*)", done.stderr):
            kernel = next(kernel for kernel in sorted(ASSUMED, key=len, reverse=True) if kernel in name)
            spills, registers = (
                re.findall(r"(\d+) bytes spill", text),
                int(re.findall(r"Used (\d+) registers", text)[0]),
            )
            shared = int((re.findall(r"(\d+) bytes smem", text) or ["0"])[0])
            assert set(spills) == {"0"}, f"{name} spills: {text}"
            most, bytes_ = ASSUMED[kernel]
            if "half" not in name and "bfloat" not in name:
                most = IN_FLOAT32.get(kernel, most)
            assert registers <= most, f"{name}: {registers} registers"
            assert shared <= bytes_, f"{name}: {shared} bytes of shared memory"
            seen.add(kernel)
    assert seen == set(ASSUMED)


@pytest.mark.kernels
@pytest.mark.timeout(300)
@with_nvcc
def test_vector_loads_are_really_there(tmp_path: Path) -> None:
    """In the PTX: two float32, and four 32-bit words of a 16-bit flat kernel, by one load."""
    for source, kernel, wanted in (
        ("wkv4", "wkv4_forward_kernelIfLi2ELb0E", r"ld\.global\.v2\.(f32|b32|u32)"),
        ("elementwise", "flat_kernelI13__nv_bfloat16NS0_11ReluSquaredELi8E", r"ld\.global\.v4\.(f32|b32|u32)"),
    ):
        output = tmp_path / f"{source}.ptx"
        command = [
            NVCC,
            *build_cuda.NVCC_FLAGS.split(),
            "-arch=compute_90",
            "-ptx",
            build.source_directory() / f"{source}.cu",
        ]
        subprocess.run([*map(str, command), "-o", str(output)], check=True)
        bodies = [text for text in output.read_text().split(".entry ")[1:] if kernel in text.split("(")[0]]
        assert len(bodies) == 1
        assert re.search(wanted, bodies[0]), kernel
