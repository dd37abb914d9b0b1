"""The CUDA engine: finds nvcc, compiles one library for several architectures, loads it where there is a card."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_train.errors import UserError
from rwkv_train.ops.build import (
    CPP,
    BuildError,
    Engine,
    cache_directories,
    escaped,
    find_compiler,
    quoted,
    run,
    sources_key,
)

# -ftz=true: a subnormal weight is as good as none, and exponentials and quotients cost one instruction less each.
NVCC_FLAGS = "-O3 -std=c++17 -ftz=true -Xcompiler -fPIC,-fvisibility=hidden"
BINDING_FLAGS = "-O2 -std=c++20 -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020d000000000000"
ARCHITECTURES = ("8.0", "9.0", "10.0")  # what `build-ops` builds for where no card says otherwise
OLDEST_TOOLKIT, OLDEST_CARD = (12, 0), (7, 0)


def find_nvcc() -> str:
    """nvcc on PATH, among Python's packages, or in /usr/local/cuda. Raises BuildError when there is none."""
    beside = [Path(entry) / "nvidia" / "cu13" / "bin" / "nvcc" for entry in sys.path]
    beside.append(Path("/usr/local/cuda/bin/nvcc"))
    found = shutil.which("nvcc") or next((str(path) for path in beside if path.exists()), None)
    if found is None:
        raise BuildError(
            "no CUDA compiler (nvcc) was found",
            'pip install "nvidia-cuda-nvcc==13.*" "nvidia-cuda-cccl==13.*", or install the CUDA toolkit',
        )
    return found


def toolkit_version(nvcc: str) -> tuple[int, int]:
    """(13, 0) and the like. Raises BuildError when nvcc does not say."""
    output = run(nvcc, "--version")
    match = re.search(r"release (\d+)\.(\d+)", output)
    if match is None:
        raise BuildError(f"{nvcc} does not say its version", f"{nvcc} --version")
    return int(match[1]), int(match[2])


def check_toolkit(version: tuple[int, int], torchs: str | None) -> None:
    """Raises BuildError when a toolkit is too old or of another major version than torch's CUDA (None: it has none)."""
    ours = ".".join(map(str, version))
    if version < OLDEST_TOOLKIT:
        oldest = ".".join(map(str, OLDEST_TOOLKIT))
        raise BuildError(f"nvcc is {ours}, the kernels need {oldest} or newer", "install a newer CUDA toolkit")
    if torchs is not None and int(torchs.split(".")[0]) != version[0]:
        major = torchs.split(".")[0]
        raise BuildError(
            f"nvcc is {ours} but this torch was built for CUDA {torchs}: a driver for one need not run the other",
            f"install a CUDA {major} toolkit, or a torch for CUDA {version[0]}",
        )


def parse_architectures(text: str) -> tuple[str, ...]:
    """From "8.0,9.0" to ("8.0", "9.0"), in order. Raises BuildError for what is no architecture, or too old a one."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not re.fullmatch(r"\d+\.\d", name):
            raise BuildError(f"{name!r} is no architecture", "--arch 8.0,9.0,10.0 (compute capabilities)")
        if _number(name) < OLDEST_CARD:
            raise BuildError(f"architecture {name} is older than 7.0, the oldest that the kernels run on", "--arch 8.0")
    return tuple(sorted(set(names), key=_number))


def cards() -> tuple[str, ...]:
    """The architectures of this machine's cards. Raises BuildError for one that is too old."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    for capability in found:
        if capability < OLDEST_CARD:
            major, minor = capability
            raise BuildError(
                f"a GPU of compute capability {major}.{minor} is older than 7.0, the oldest that the kernels run on",
                "RWKV_OPS=reference runs the definition on it",
            )
    return tuple(f"{major}.{minor}" for major, minor in sorted(found))


def covers(built: Sequence[str], needed: Sequence[str]) -> bool:
    """Whether code for `built` runs on every card of `needed`: same major, no newer minor; or the newest one's PTX."""
    newest = _number(built[-1])
    return all(
        _number(card) >= newest
        or any(_number(code)[0] == _number(card)[0] and _number(code) <= _number(card) for code in built)
        for card in needed
    )


def _number(architecture: str) -> tuple[int, int]:
    major, minor = architecture.split(".")
    return int(major), int(minor)


@dataclass
class CudaEngine(Engine):
    """The library of CUDA kernels; a build for several architectures serves every card that it covers."""

    architectures: tuple[str, ...] = ()  # what to build for; empty: this machine's cards

    def _load(self) -> Path:
        if not torch.cuda.is_available():
            why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
            raise BuildError(why, "rwkv-train doctor")
        return super()._load()

    def build(self, cache: Path | None = None) -> Path:
        """As Engine.build: one fat binary for `architectures`, or for the cards, or for ARCHITECTURES without any."""
        needed = self.architectures or cards() or ARCHITECTURES
        nvcc = find_nvcc()
        version = toolkit_version(nvcc)
        check_toolkit(version, torch.version.cuda)
        compiler = find_compiler()
        public = torch.__version__.split("+")[0]  # a login node's CPU build of torch may compile for the others
        flags = [NVCC_FLAGS, BINDING_FLAGS, public, str(version), run(compiler, "--version")]
        key = sources_key(self.sources, ("*.h", "*.cuh")) + "\0" + "\0".join(flags)
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._nvcc, self._needed = nvcc, needed
        roots = [cache] if cache else cache_directories()
        for root in roots:
            for library in sorted(root.glob(f"{self.name}-{digest}-*/{self.library_name}")):
                if covers(library.parent.name.split("-")[2:], needed):
                    return library
        return self._build_in_one_of(roots, f"{self.name}-{digest}-{'-'.join(needed)}", compiler)

    def _ninja_file(self, compiler: str, sources: Path) -> str:
        home = Path(torch.__file__).parent
        codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (name.replace(".", "") for name in self._needed)]
        newest = self._needed[-1].replace(".", "")
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # for cards that are not made yet
        nvcc = f"{quoted(self._nvcc)} -ccbin {quoted(compiler)}"
        kernels = [name for name in self.sources if name.endswith(".cu")]
        binding = next(name for name in self.sources if name.endswith(".cpp"))
        objects = [f"{Path(name).stem}.o" for name in (*kernels, binding)]
        lines = [
            "rule kernel",
            f"  command = {nvcc} {NVCC_FLAGS} {' '.join(codes)} -c $in -o $out",
            "rule binding",
            f"  command = {quoted(compiler)} {BINDING_FLAGS} -isystem {quoted(home / 'include')} -c $in -o $out",
            "rule link",
            f"  command = {nvcc} -shared -cudart static $in -o $out -L{quoted(home / 'lib')} -ltorch_cpu",
            *(f"build {Path(name).stem}.o: kernel {escaped(sources / name)}" for name in kernels),
            f"build {Path(binding).stem}.o: binding {escaped(sources / binding)}",
            f"build {self.library_name}: link {' '.join(objects)}",
        ]
        return "\n".join(lines) + "\n"


CUDA = CudaEngine("cuda", ("wkv4.cu", "elementwise.cu", "binding_cuda.cpp"))


def build_ahead(architectures: str | None, cache: str | None) -> list[Path]:
    """Compiles the C++ and the CUDA engine; the libraries' paths.

    Args:
        architectures: of the cards, like "8.0,9.0"; None: this machine's, or ARCHITECTURES where it has none.
        cache: a directory to build in instead of the usual one.

    Raises:
        UserError: no compiler, one that does not fit, sources that do not compile.
    """
    place = None if cache is None else Path(cache).expanduser().resolve()
    try:
        wanted = () if architectures is None else parse_architectures(architectures)
        return [CPP.build(place), CudaEngine(CUDA.name, CUDA.sources, architectures=wanted).build(place)]
    except BuildError as error:
        raise UserError(error.why, f"try: {error.command}") from error
