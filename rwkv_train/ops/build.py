"""Compiles and loads an operator engine, once per machine: inside the first real call of an operator, never at import.

Safe when several processes build at once, when a builder is killed and when the home directory cannot be written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import ninja
import torch

from rwkv_train.errors import UserError
from rwkv_train.resources import resource

# -fno-math-errno and -fno-trapping-math let loops with a square root or a select become vector code; none of the flags
# lets the compiler reorder sums or forget about NaN.
FLAGS = (
    "-O3 -march=native -std=c++20 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math"
    " -ffp-contract=fast -DTORCH_TARGET_VERSION=0x020d000000000000"
)
COMPILERS = ("g++", "c++", "clang++")


class BuildError(Exception):
    """Why an engine cannot be had: `why` in one line, `command` that shows it to a person."""

    def __init__(self, why: str, command: str) -> None:
        super().__init__(why)
        self.why, self.command = why, command


def source_directory() -> Path:
    """Where the kernels' sources are."""
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
        lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines() or ["?"]
        raise BuildError(lines[0].strip()[:300], " ".join(command))
    return output


def sources_key(names: tuple[str, ...], headers: tuple[str, ...]) -> str:
    """What a library is made of: the named files of cuda/ and its headers, as one text."""
    folder = source_directory()
    files = [folder / name for name in names] + sorted(file for pattern in headers for file in folder.glob(pattern))
    return "\0".join(file.read_text() for file in files)


@dataclass
class Engine:
    """A shared library that registers implementations of our operators.

    Attributes:
        name: as in RWKV_OPS.
        sources: file names in cuda/; the headers there count as sources too when the cache is looked up.
        required: a failed build raises UserError instead of warning once.
    """

    name: str
    sources: tuple[str, ...]
    required: bool = False
    library: Path | None = None  # set once loaded
    error: BuildError | None = None  # set once failed
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self) -> bool:
        """Builds the engine where needed and loads it; True when its implementations are registered.

        Raises:
            UserError: the engine is required and cannot be had.
        """
        with self._lock:
            if self.library is None and self.error is None:
                try:
                    self.library = self._load()
                except BuildError as error:
                    self.error = error
                    if not self.required:
                        warnings.warn(
                            f"the {self.name} engine is not available: operators run by their definition, far slower\n"
                            f"  why: {error.why}\n  try: {error.command}",
                            RuntimeWarning,
                            stacklevel=2,
                        )
        if self.required and self.error is not None:
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
            except OSError as error:  # a library that was damaged in the cache: once more from the sources
                library.unlink(missing_ok=True)
                if attempt:
                    raise BuildError(f"{library} cannot be loaded: {error}", "rwkv-train doctor") from error
        raise AssertionError

    def build(self, cache: Path | None = None) -> Path:
        """Path of the compiled library; compiles it unless the cache has it.

        Args:
            cache: where to look and build; None: ~/.cache/rwkv_train, or a private directory under the system's
                temporary one where the home cannot be written.

        Raises:
            BuildError: no compiler, the sources do not compile, or nowhere to write.
        """
        compiler = find_compiler()
        # What -march=native means here is asked of the compiler: a home shared by unlike machines stays right.
        native = run(compiler, "-march=native", "-###", "-E", "-x", "c++", os.devnull)
        texts = [sources_key(self.sources, ("*.h",)), FLAGS, torch.__version__, run(compiler, "--version"), native]
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
        roots = [cache] if cache else cache_directories()
        return self._build_in_one_of(roots, f"{self.name}-{digest}", compiler)

    @property
    def library_name(self) -> str:
        """The file that a build ends in."""
        return f"rwkv_train_{self.name}.so"

    def _build_in_one_of(self, roots: list[Path], name: str, compiler: str) -> Path:
        failures = []
        for root in roots:
            try:
                return self._build_in(root / name, compiler, source_directory())
            except OSError as error:
                failures.append(f"{root}: {error.strerror or error}")
        raise BuildError(f"nowhere to write the compiled engine ({'; '.join(failures)})", "df -h ~ /tmp")

    def _build_in(self, directory: Path, compiler: str, sources: Path) -> Path:
        library = directory / self.library_name
        if library.exists():  # it was renamed into place when whole
            return library
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when a builder dies, however it dies
            if library.exists():
                return library
            for left_over in directory.glob("build-*"):  # of a builder that was killed
                shutil.rmtree(left_over, ignore_errors=True)
            workplace = Path(tempfile.mkdtemp(prefix="build-", dir=directory))
            try:
                (workplace / "build.ninja").write_text(self._ninja_file(compiler, sources))
                run(str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(workplace))
                os.replace(workplace / library.name, library)
            finally:
                shutil.rmtree(workplace, ignore_errors=True)
        return library

    def _ninja_file(self, compiler: str, sources: Path) -> str:
        home = Path(torch.__file__).parent
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


def quoted(path: str | Path) -> str:
    return "'" + str(path).replace("'", "'\\''").replace("$", "$$") + "'"  # for the shell inside a ninja file


def escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # for a path in a ninja file


CACHE: Path | None = None  # set by rwkv_train.ops: where to look and build before anywhere else


def cache_directories() -> list[Path]:
    """Where a built engine may lie, best first."""
    roots = [] if CACHE is None else [CACHE]
    with contextlib.suppress(RuntimeError):  # this user has no home
        roots.append(Path.home() / ".cache" / "rwkv_train")
    private = Path(tempfile.gettempdir()) / f"rwkv_train-{os.getuid()}"
    with contextlib.suppress(OSError):
        private.mkdir(mode=0o700, exist_ok=True)
        if private.stat().st_uid == os.getuid():  # else somebody else's library would be loaded
            roots.append(private)
    return roots


CPP = Engine("cpp", ("binding.cpp", "wkv4_cpu.cpp", "elementwise_cpu.cpp"))
