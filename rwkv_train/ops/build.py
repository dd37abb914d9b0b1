"""Compiles and loads the engines: one shared library per operator family and device, once per machine.

A library is built inside the first call of an operator of its family, never at import. That is safe when several
processes build at once, when a builder is killed and when the home directory cannot be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import ninja
import torch

from rwkv_train.errors import UserError
from rwkv_train.file_lock import lock
from rwkv_train.resources import resource

# -fno-math-errno and -fno-trapping-math let loops with a square root or a select become vector code; none of the flags
# lets the compiler reorder sums or ignore NaN.
FLAGS = (
    "-O3 -march=native -std=c++20 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math"
    " -ffp-contract=fast -DTORCH_TARGET_VERSION=0x020d000000000000"
)
COMPILERS = ("g++", "c++", "clang++")


@dataclass
class BuildSettings:
    """What the environment asks of all engines; rwkv_train.ops sets it at import.

    Attributes:
        required: name of the engine whose failed build raises UserError instead of warning once; None: no engine.
        cache: directory where compiled libraries are looked for, and built, before any other; None: the usual ones.
    """

    required: str | None = None
    cache: Path | None = None


SETTINGS = BuildSettings()


class BuildError(Exception):
    """Why an engine is not available: `why` in one line, and the `command` that fixes or shows it."""

    def __init__(self, why: str, command: str) -> None:
        super().__init__(why)
        self.why, self.command = why, command


def source_directory() -> Path:
    """The directory of the kernels' sources."""
    return resource("cuda")


def find_compiler() -> str:
    """The C++ compiler's path. Raises BuildError when there is none."""
    for name in COMPILERS:
        found = shutil.which(name) or shutil.which(name, path=os.defpath)  # the latter for a stripped PATH
        if found:
            return found
    raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)}) was found", "sudo apt install g++")


def run(*command: str) -> str:
    """Output and errors of a command. Raises BuildError when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error), " ".join(command)) from error
    output = done.stdout + done.stderr
    if done.returncode:
        lines = output.splitlines() or ["it printed nothing"]
        errors = [line for line in lines if re.search(r"\berror\b[^:]*: ", line, re.IGNORECASE)]
        raise BuildError((errors or lines)[0].strip()[:300], " ".join(command))
    return output


def sources_text(names: tuple[str, ...], header_patterns: tuple[str, ...]) -> str:
    """The named files of cuda/ and its headers as one text, from which the digest of a library is made."""
    folder = source_directory()
    headers = sorted(file for pattern in header_patterns for file in folder.glob(pattern))
    return "\0".join(file.read_text() for file in [*(folder / name for name in names), *headers])


def digest(*texts: str) -> str:
    """16 hexadecimal digits that change with any of the texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@dataclass
class Engine(ABC):
    """One family's operators on one kind of device: a shared library that registers their implementations.

    Attributes:
        name: of the engine, as in RWKV_OPS; the same for every family.
        device: type of the devices that it runs on, as torch names it.
        dtypes: storage dtypes that it computes in.
        family: of operators, as in families.FAMILIES.
        sources: file names in cuda/; the headers there count as sources too when the cache is looked up.
        library: path of the loaded library; None before `load` succeeded.
        error: why it is not available; None before `load` failed.
    """

    name: ClassVar[Literal["cpp", "cuda"]]
    device: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    family: str
    sources: tuple[str, ...]
    library: Path | None = None
    error: BuildError | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @abstractmethod
    def build(self, cache: Path | None = None) -> Path:
        """Path of the compiled library; compiles it unless the cache has it.

        Args:
            cache: where to look and build; None: BuildSettings.cache, then ~/.cache/rwkv_train, then a private
                directory under the system's temporary one where the home cannot be written.

        Raises:
            BuildError: no compiler, the sources do not compile, or no directory that can be written.
        """

    def load(self) -> bool:
        """Builds the library where needed and loads it; True when its implementations are registered.

        Raises:
            UserError: BuildSettings.required names this engine, and it is not available.
        """
        required = SETTINGS.required == self.name
        with self._lock:
            if self.library is None and self.error is None:
                try:
                    self.library = self._load()
                except BuildError as error:
                    self.error = error
                    if not required:
                        _warn_once(self.name, error)
        if required and self.error is not None:
            raise UserError(
                f"RWKV_OPS={self.name} demands an engine that is not available: {self.error.why}",
                f"try: {self.error.command}; or unset RWKV_OPS, and the definition runs",
            )
        return self.library is not None

    def _load(self) -> Path:
        for attempt in range(2):
            library = self.build()
            try:
                torch.ops.load_library(str(library))
                return library
            except OSError as error:  # a library that was damaged in the cache is built again, once
                library.unlink(missing_ok=True)
                if attempt:
                    raise BuildError(f"{library} cannot be loaded: {error}", "rwkv-train doctor") from error
        raise AssertionError

    @property
    def library_name(self) -> str:
        """File name of the compiled library."""
        return f"rwkv_train_{self.name}_{self.family}.so"


_warned: set[tuple[str, str]] = set()  # engine and reason: families that fail for one reason give one warning


def _warn_once(name: str, error: BuildError) -> None:
    if (name, error.why) in _warned:
        return
    _warned.add((name, error.why))
    warnings.warn(
        f"the {name} engine is not available: operators run by their definition, far slower\n"
        f"  why: {error.why}\n  try: {error.command}",
        RuntimeWarning,
        stacklevel=3,
    )


class CppEngine(Engine):
    """The CPU library of one operator family."""

    name = "cpp"
    device = "cpu"
    dtypes = (torch.float32, torch.bfloat16)

    def build(self, cache: Path | None = None) -> Path:
        """As Engine.build."""
        compiler = find_compiler()
        # The compiler is asked what -march=native means here: a home shared by different machines stays right.
        native = run(compiler, "-march=native", "-###", "-E", "-x", "c++", os.devnull)
        key = digest(sources_text(self.sources, ("*.h",)), FLAGS, torch.__version__, run(compiler, "--version"), native)
        roots = [cache] if cache else cache_directories()
        return build_in_first(roots, f"{self.name}-{self.family}-{key}", self.library_name, self._ninja_file(compiler))

    def _ninja_file(self, compiler: str) -> str:
        home, sources = Path(torch.__file__).parent, source_directory()
        # The compiler calls as and ld by PATH, which a service may have stripped.
        call = f'PATH="$$PATH:{os.defpath}" {quoted(compiler)}'
        objects = [f"{Path(name).stem}.o" for name in self.sources]
        lines = [
            "rule compile",
            f"  command = {call} {FLAGS} -isystem {quoted(home / 'include')} -c $in -o $out",
            "rule link",
            f"  command = {call} -shared $in -o $out -L{quoted(home / 'lib')} -ltorch_cpu",
            *(
                f"build {obj}: compile {escaped(sources / name)}"
                for obj, name in zip(objects, self.sources, strict=True)
            ),
            f"build {self.library_name}: link {' '.join(objects)}",
        ]
        return "\n".join(lines) + "\n"


def build_in_first(roots: list[Path], directory_name: str, library_name: str, ninja_file: str) -> Path:
    """Builds a library in the first of `roots` that only this user can write; raises BuildError if none is."""
    failures = []
    for root in roots:
        try:
            for directory in (root, root / directory_name):
                _safe_directory(directory)
            return _build_in(root / directory_name, library_name, ninja_file)
        except OSError as error:
            failures.append(f"{directory}: {error.strerror or error}")
            if error.strerror is None:  # of ours
                warnings.warn(f"no engine is compiled or loaded in {failures[-1]}", RuntimeWarning, stacklevel=3)
    raise BuildError(f"nowhere to write the compiled engine ({'; '.join(failures)})", "df -h ~ /tmp")


def _build_in(directory: Path, library_name: str, ninja_file: str) -> Path:
    library = directory / library_name
    if library.exists():  # complete: it is renamed to this name after the build
        return library
    with open(directory / "lock", "w") as file:
        lock(file, wait=True)
        if library.exists():
            return library
        for left_over in directory.glob("build-*"):  # of a builder that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix="build-", dir=directory))
        try:
            (temporary / "build.ninja").write_text(ninja_file)
            run(str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(temporary))
            os.replace(temporary / library_name, library)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return library


def quoted(path: str | Path) -> str:
    """A path for the shell inside a ninja file."""
    return "'" + str(path).replace("'", "'\\''").replace("$", "$$") + "'"


def escaped(path: Path) -> str:
    """A path for a build line of a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def cache_directories() -> list[Path]:
    """Where compiled libraries are looked for and built, best first."""
    roots = [] if SETTINGS.cache is None else [SETTINGS.cache]
    with contextlib.suppress(RuntimeError):  # this user has no home
        roots.append(Path.home() / ".cache" / "rwkv_train")
    roots.append(Path(tempfile.gettempdir()) / f"rwkv_train-{os.getuid()}")
    return roots


def _safe_directory(path: Path) -> None:
    """Makes a directory where there is none, and refuses one in which others could put a library for us to load.

    Raises:
        OSError: it cannot be made; it or the link to it belongs to another user (root may own it); others may write to
            it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for state in (path.lstat(), path.stat()):  # of a link, and of what it leads to
        if state.st_uid not in (os.getuid(), 0):
            raise OSError(f"it belongs to user {state.st_uid}; RWKV_OPS_CACHE=DIRECTORY names another one")
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"other users may write to it; `chmod go-w {path}` makes it usable")
