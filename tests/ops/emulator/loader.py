"""Compiles our CUDA kernels with g++ and runs them on the CPU, thread by thread (see emulator.h).

kernels = load("check")                              # "plain", "asan" or "check"
y = kernels.empty("y", (2, 70, 6), "float32")
kernels.call("rwkv_relu_squared", 0, y.size, kernels.array("k", k), y, None)
y.numpy()                                            # raises EmulatorError if the call found an error
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[2] / "cuda"
CACHE = Path(tempfile.gettempdir()) / f"rwkv_train_emulator-{os.getuid()}"
COMMON = [
    *("-x", "c++", "-std=c++17", "-fPIC", "-gdwarf-4", "-Wall", "-Wno-unknown-pragmas"),
    "-ffp-contract=off",  # no multiply-add but where the source says fmaf
    "-fno-gnu-unique",  # or two builds in one process share their static variables
    "-fno-tree-loop-distribute-patterns",  # loops stay loops: the hooks do not see memset and memcpy
]
MODES = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,bounds", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "check": ["-O1", "-fsanitize=thread", "-fno-tree-vectorize"],
}
LINK = {"plain": ["-Wl,-z,defs"], "asan": ["-fsanitize=address,bounds"], "check": ["-Wl,-z,defs"]}  # no libtsan
RED_ZONE = 256  # bytes after every shared variable, as in emulator.h


class EmulatorError(RuntimeError):
    """The emulator stopped a launch: deadlock, race, out of bounds, unwritten memory or an illegal launch."""


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compiled(mode: str, cuda: Path = CUDA, unit: Path = HERE / "kernels.cpp") -> Path:
    """The shared library of `unit` with the kernels of the folder `cuda`, compiled now or found in the cache."""
    flags = [*COMMON, *MODES[mode], f"-I{HERE}", f"-I{cuda}"]
    sources = sorted(path for path in cuda.iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    texts = [path.read_text() for path in (unit, *sources, *sorted(HERE.glob("*.h")), Path(__file__))]
    key = hashlib.sha256("\0".join([*texts, *MODES[mode], run("g++", "--version")]).encode()).hexdigest()[:16]
    library = CACHE / f"{mode}-{key}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        assembly, object_file, linked = (Path(folder) / f"kernels.{suffix}" for suffix in ("s", "o", "so"))
        run("g++", *flags, "-S", unit, "-o", assembly)
        assembly.write_text(_with_red_zones(assembly.read_text()))
        run("g++", "-c", assembly, "-o", object_file)
        run("g++", "-shared", object_file, "-o", linked, "-Wl,-Bsymbolic", *LINK[mode])
        os.replace(linked, library)
    return library


def _with_red_zones(assembly: str) -> str:
    """The same with RED_ZONE bytes after every shared variable: each is one `.zero N` (its size stays N) in .tbss."""
    lines, shared = assembly.split("\n"), False
    for index, line in enumerate(lines):
        fields = line.split(None, 1)
        if fields and fields[0] in (".section", ".text", ".data", ".bss", ".popsection", ".pushsection"):
            shared = line.strip().startswith(".section") and ".tbss" in line
        elif shared and fields and fields[0] == ".zero":
            lines[index] = f"\t.zero\t{int(fields[1]) + RED_ZONE}"
    return "\n".join(lines)


class Buffer:
    """Global memory: red zones on both sides, filled by an array or unwritten."""

    def __init__(self, library: ctypes.CDLL, name: str, content: numpy.ndarray[Any, Any], filled: bool) -> None:
        self.shape, self.dtype, self.size, self._free = content.shape, content.dtype, content.size, library.emu_free
        data = content.ctypes.data if filled else None
        self.pointer = library.emu_malloc(name.encode(), content.nbytes, data)

    def numpy(self) -> numpy.ndarray[Any, Any]:
        text = ctypes.string_at(self.pointer, self.size * self.dtype.itemsize)
        return numpy.frombuffer(text, self.dtype).reshape(self.shape).copy()

    def __del__(self) -> None:
        self._free(self.pointer)


class Kernels:
    """A compiled library; `schedule` sets the order of threads between barriers, and of blocks."""

    def __init__(self, path: Path) -> None:
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.library.emu_error.restype = ctypes.c_char_p
        self.library.emu_malloc.restype = ctypes.c_void_p
        self.library.emu_malloc.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
        self.library.emu_free.argtypes = [ctypes.c_void_p]
        self.library.emu_shared_variable.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t, ctypes.c_size_t]
        self.library.emu_configure.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.library.emu_last_blocks.argtypes = [ctypes.c_uint64]
        variables = {}
        for line in run("readelf", "-sW", "--demangle", path).splitlines():
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and fields[3] == "TLS" and int(fields[2], 0):
                variables[fields[7]] = int(fields[1], 16), int(fields[2], 0)
        origin, _ = variables.pop("emu_origin")
        for name, (offset, size) in variables.items():
            short = re.sub(r"\([^()]*\)(?=::|$)", "", name.replace("(anonymous namespace)::", ""))
            short = short.replace("rwkv::", "").removeprefix("void ")  # kernel<float, 2>::part
            self.library.emu_shared_variable(f"shared {short}".encode(), offset - origin, size)

    def schedule(self, order: str = "forward", seed: int = 0) -> None:
        self.library.emu_configure(("forward", "reverse", "random").index(order), seed)

    def array(self, name: str, content: Any, dtype: str | None = None) -> Buffer:
        return Buffer(self.library, name, numpy.ascontiguousarray(content, dtype), filled=True)

    def empty(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        return Buffer(self.library, name, numpy.empty(shape, dtype), filled=False)

    def call(self, function: str, *arguments: int | Buffer | list[Buffer] | None) -> None:
        """Calls a launcher of kernels.h: integers as int64 (the first as int), buffers and lists of them as pointers.

        Raises:
            EmulatorError: the emulator found something, or the launcher refused.
        """
        first, *rest = arguments
        values: list[Any] = [ctypes.c_int(first)]  # type: ignore[arg-type]
        for argument in rest:
            if isinstance(argument, list):
                values.append((ctypes.c_void_p * len(argument))(*(buffer.pointer for buffer in argument)))
            elif isinstance(argument, int):
                values.append(ctypes.c_int64(argument))
            else:
                values.append(ctypes.c_void_p(None if argument is None else argument.pointer))
        launcher = self.library[function]
        launcher.restype = ctypes.c_char_p
        refusal = launcher(*values)
        if text := self.library.emu_error().decode():
            self.library.emu_forget()
            raise EmulatorError(re.sub(r"\[pc (0x[0-9a-f]+)\]", self._source_line, text))
        if refusal:
            raise EmulatorError(refusal.decode())

    def _source_line(self, match: re.Match[str]) -> str:
        """The line of a program counter: of its inlined frames the innermost one outside the emulator."""
        frames = run("addr2line", "-i", "-e", self.path, match[1]).split("\n")
        names = [frame.split(" (")[0].rsplit("/", 1)[-1] for frame in frames if frame]
        return next((name for name in names if not name.startswith(("emulator.h", "detector.h"))), names[0])


def load(mode: str = "plain", cuda: Path = CUDA) -> Kernels:
    """Compiles and loads. The mode "asan" needs a process started with `asan_environment()`."""
    return Kernels(compiled(mode, cuda))


def asan_environment() -> dict[str, str]:
    """The environment in which Python can load a library built with mode="asan"."""
    runtime = run("g++", "-print-file-name=libasan.so").strip()
    return {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
