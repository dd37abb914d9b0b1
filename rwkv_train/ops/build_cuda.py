"""The CUDA engine: finds nvcc, compiles a library for several architectures, loads it where there is a GPU."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rwkv_train.ops.build import (
    BuildError,
    Engine,
    build_in_first,
    cache_directories,
    digest,
    escaped,
    find_compiler,
    quoted,
    run,
    source_directory,
    sources_text,
)

# -ftz=true flushes subnormal numbers to 0: exponentials and quotients then cost one instruction less each.
NVCC_FLAGS = "-O3 -std=c++17 -ftz=true -Xcompiler -fPIC,-fvisibility=hidden"
BINDING_FLAGS = "-O2 -std=c++20 -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020d000000000000"
ARCHITECTURES = ("8.0", "9.0", "10.0")  # what `build-ops` builds for on a machine without a GPU
OLDEST_TOOLKIT, OLDEST_ARCHITECTURE = (12, 0), (7, 0)


def find_nvcc() -> str:
    """nvcc on PATH, among Python's packages, or in /usr/local/cuda. Raises BuildError when there is none."""
    candidates = [Path(entry) / "nvidia" / "cu13" / "bin" / "nvcc" for entry in sys.path]
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    found = shutil.which("nvcc") or next((str(path) for path in candidates if path.exists()), None)
    if found is None:
        raise BuildError(
            "no CUDA compiler (nvcc) was found",
            'pip install "nvidia-cuda-nvcc==13.*" "nvidia-cuda-cccl==13.*", or install the CUDA toolkit',
        )
    return found


def toolkit_version(nvcc: str) -> tuple[int, int]:
    """Major and minor version of nvcc, as (13, 0). Raises BuildError when its output has none."""
    output = run(nvcc, "--version")
    match = re.search(r"release (\d+)\.(\d+)", output)
    if match is None:
        raise BuildError(f"{nvcc} --version prints no release", f"{nvcc} --version")
    return int(match[1]), int(match[2])


def check_toolkit(version: tuple[int, int], torch_cuda: str | None) -> None:
    """Raises BuildError when a toolkit is too old or of another major version than torch's CUDA (None: a CPU build)."""
    ours = ".".join(map(str, version))
    if version < OLDEST_TOOLKIT:
        oldest = ".".join(map(str, OLDEST_TOOLKIT))
        raise BuildError(f"nvcc is {ours}, the kernels need {oldest} or newer", "install a newer CUDA toolkit")
    if torch_cuda is not None and int(torch_cuda.split(".")[0]) != version[0]:
        major = torch_cuda.split(".")[0]
        raise BuildError(
            f"nvcc is {ours} but this torch was built for CUDA {torch_cuda}: a driver for one need not run the other",
            f"install a CUDA {major} toolkit, or a torch for CUDA {version[0]}",
        )


def parse_architectures(text: str) -> tuple[str, ...]:
    """From "9.0,8.0" to ("8.0", "9.0"). Raises BuildError for text that is no architecture, and for an old one."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not re.fullmatch(r"\d+\.\d", name):
            raise BuildError(f"{name!r} is no architecture", "--arch 8.0,9.0,10.0 (compute capabilities)")
        if _number(name) < OLDEST_ARCHITECTURE:
            raise BuildError(f"architecture {name} is older than 7.0, the oldest that the kernels run on", "--arch 8.0")
    return tuple(sorted(set(names), key=_number))


def local_architectures() -> tuple[str, ...]:
    """The architectures of this machine's GPUs, sorted. Raises BuildError for one that is too old."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    for capability in found:
        if capability < OLDEST_ARCHITECTURE:
            major, minor = capability
            raise BuildError(
                f"a GPU of compute capability {major}.{minor} is older than 7.0, the oldest that the kernels run on",
                "RWKV_OPS=reference runs the definition on it",
            )
    return tuple(f"{major}.{minor}" for major, minor in sorted(found))


def covers(built: Sequence[str], needed: Sequence[str]) -> bool:
    """Whether a library for the architectures `built` runs on GPUs of all the architectures `needed`.

    Code runs on its own major version with no older minor version; the PTX of the newest one runs on anything newer.
    """
    newest = _number(built[-1])
    return all(
        _number(gpu) >= newest
        or any(_number(code)[0] == _number(gpu)[0] and _number(code) <= _number(gpu) for code in built)
        for gpu in needed
    )


def _number(architecture: str) -> tuple[int, int]:
    major, minor = architecture.split(".")
    return int(major), int(minor)


class CudaEngine(Engine):
    """The CUDA library of one operator family; a build for several architectures serves every GPU that it covers."""

    name = "cuda"
    device = "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def _load(self) -> Path:
        if not torch.cuda.is_available():
            why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
            raise BuildError(why, "rwkv-train doctor")
        return super()._load()

    def build(self, cache: Path | None = None, architectures: tuple[str, ...] = ()) -> Path:
        """As Engine.build, one library for all `architectures`; (): this machine's, or ARCHITECTURES without a GPU."""
        needed = architectures or local_architectures() or ARCHITECTURES
        nvcc = find_nvcc()
        version = toolkit_version(nvcc)
        check_toolkit(version, torch.version.cuda)
        compiler = find_compiler()
        public = torch.__version__.split("+")[0]  # a login node's CPU build of torch may compile for the GPU nodes
        flags = [NVCC_FLAGS, BINDING_FLAGS, public, str(version), run(compiler, "--version")]
        prefix = f"{self.name}-{self.family}-{digest(sources_text(self.sources, ('*.h', '*.cuh')), *flags)}"
        roots = [cache] if cache else cache_directories()
        for root in roots:
            for library in sorted(root.glob(f"{prefix}-*/{self.library_name}")):
                if covers(library.parent.name.removeprefix(f"{prefix}-").split("-"), needed):
                    return library
        ninja_file = self._ninja_file(nvcc, compiler, needed)
        return build_in_first(roots, f"{prefix}-{'-'.join(needed)}", self.library_name, ninja_file)

    def _ninja_file(self, nvcc: str, compiler: str, architectures: tuple[str, ...]) -> str:
        home, folder = Path(torch.__file__).parent, source_directory()
        numbers = [name.replace(".", "") for name in architectures]
        codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
        codes.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")  # PTX, for newer GPUs
        call = f"{quoted(nvcc)} -ccbin {quoted(compiler)}"
        objects = [f"{Path(name).stem}.o" for name in self.sources]
        lines = [
            "rule kernel",
            f"  command = {call} {NVCC_FLAGS} {' '.join(codes)} -c $in -o $out",
            "rule binding",
            f"  command = {quoted(compiler)} {BINDING_FLAGS} -isystem {quoted(home / 'include')} -c $in -o $out",
            "rule link",
            f"  command = {call} -shared -cudart static $in -o $out -L{quoted(home / 'lib')} -ltorch_cpu",
            *(
                f"build {obj}: {'kernel' if name.endswith('.cu') else 'binding'} {escaped(folder / name)}"
                for obj, name in zip(objects, self.sources, strict=True)
            ),
            f"build {self.library_name}: link {' '.join(objects)}",
        ]
        return "\n".join(lines) + "\n"
