"""The operator families and their engines: each is compiled apart, so that a user builds only what runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rwkv_train.errors import UserError
from rwkv_train.ops.build import BuildError, CppEngine, Engine
from rwkv_train.ops.build_cuda import CudaEngine, parse_architectures
from rwkv_train.user_path import user_path


@dataclass(frozen=True)
class Family:
    """Operators that are declared in one file of registration/ and compiled into one library per kind of device.

    Attributes:
        cpp: the engine for CPUs.
        cuda: the engine for NVIDIA GPUs; None: there the definition runs.
    """

    cpp: CppEngine
    cuda: CudaEngine | None

    def engine(self, device: str) -> Engine | None:
        """The engine for a type of device, as torch names it; None where there is none."""
        engines = (self.cpp, self.cuda)
        return next((engine for engine in engines if engine is not None and engine.device == device), None)


def _family(name: str, cpp: tuple[str, ...], cuda: tuple[str, ...] = ()) -> Family:
    return Family(CppEngine(name, cpp), CudaEngine(name, cuda) if cuda else None)


# The names of the sources of each device in cuda/, the slowest to compile first.
FAMILIES: dict[str, Family] = {
    "wkv4": _family(
        "wkv4",
        cpp=("wkv4_cpu.cpp", "binding_wkv4.cpp"),
        cuda=("wkv4.cu", "binding_wkv4_cuda.cpp"),
    ),
    "wkv7": _family("wkv7", cpp=("wkv7_cpu.cpp", "binding_wkv7.cpp")),
    "rwkv7": _family("rwkv7", cpp=("rwkv7_cpu.cpp", "binding_rwkv7.cpp")),
    "head_norm": _family("head_norm", cpp=("head_norm_cpu.cpp", "binding_head_norm.cpp")),
    "elementwise": _family(
        "elementwise",
        cpp=("shift_mix_backward_cpu.cpp", "binding_elementwise.cpp", "elementwise_cpu.cpp"),
        cuda=("elementwise.cu", "binding_elementwise_cuda.cpp"),
    ),
}


def cuda_engines() -> dict[str, CudaEngine]:
    """The CUDA engine of each family that has one."""
    return {name: family.cuda for name, family in FAMILIES.items() if family.cuda is not None}


def build_ahead(architectures: str | None, cache: str | None) -> list[Path]:
    """Compiles every engine of every family; the libraries' paths, those for CPUs first.

    Args:
        architectures: of the GPUs, like "8.0,9.0"; None: this machine's, or ARCHITECTURES where it has none.
        cache: a directory to build in instead of the usual one.

    Raises:
        UserError: no compiler, one that does not fit, sources that do not compile.
    """
    directory = None if cache is None else user_path(cache).resolve()
    try:
        wanted = () if architectures is None else parse_architectures(architectures)
        libraries = [family.cpp.build(directory) for family in FAMILIES.values()]
        return libraries + [engine.build(directory, wanted) for engine in cuda_engines().values()]
    except BuildError as error:
        raise UserError(error.why, f"try: {error.command}") from error
