"""`rwkv-train doctor`: what works on this machine, and for what does not, why and the remedy."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rwkv_train import __version__


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        verdict: "ok"; "note" for something optional that is missing; "BAD" for a problem.
        what: what was found.
        remedy: what to do about it; empty: nothing.
    """

    verdict: Literal["ok", "note", "BAD"]
    what: str
    remedy: str = ""


def examine(cores: int) -> int:
    """Prints every finding; 1 if one of them is bad, else 0.

    Args:
        cores: CPU cores that this process may use.
    """
    sections: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions (tested range)": versions,
        "compiler": compiler,
        "operator engines": engines,
        "devices": lambda: devices(cores),
    }
    print(f"rwkv-train {__version__} on {platform.platform()}")
    bad = 0
    for title, findings in sections.items():
        print(f"\n{title}", flush=True)
        for finding in findings():
            bad += finding.verdict == "BAD"
            print(f"  {finding.verdict:4}  {finding.what}", flush=True)
            if finding.remedy:
                print(f"        {finding.remedy}")
    print(f"\n{bad} problem{'s need' if bad > 1 else ' needs'} attention." if bad else "\nNo problems found.")
    return 1 if bad else 0


def versions() -> Iterator[Finding]:
    """Python and every dependency, against the ranges that the tests ran on."""
    try:
        ours = metadata.metadata("rwkv-train")
    except metadata.PackageNotFoundError:
        yield Finding("BAD", "rwkv-train is not installed, so its tested ranges are not known", "pip install -e .")
        return
    python, wanted = platform.python_version(), ours["Requires-Python"]
    if SpecifierSet(wanted).contains(python, prereleases=True):
        yield Finding("ok", f"python {python} ({wanted})")
    else:
        yield Finding(
            "BAD", f"python {python} is outside {wanted}", "make a venv with another Python: python3.11 -m venv .venv"
        )
    for line in ours.get_all("Requires-Dist") or []:
        yield from _version(Requirement(line))


def _version(needed: Requirement) -> Iterator[Finding]:
    if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
        return  # an extra
    install = f"pip install '{needed.name}{needed.specifier}'"
    try:
        version = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        yield Finding("BAD", f"{needed.name} is not installed ({needed.specifier})", install)
        return
    if needed.specifier.contains(version, prereleases=True):
        yield Finding("ok", f"{needed.name} {version} ({needed.specifier})")
    else:
        yield Finding("BAD", f"{needed.name} {version} is outside the tested {needed.specifier}", install)


def compiler() -> Iterator[Finding]:
    """The C++ compiler, which builds the engines, and Python's headers, which only torch.compile needs."""
    from rwkv_train.ops.build import BuildError, find_compiler

    try:
        yield Finding("ok", f"C++ compiler {find_compiler()}")
    except BuildError as error:
        yield Finding("BAD", error.why, error.command)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if header.exists():
        yield Finding("ok", f"Python headers {header.parent} (for compile=true)")
    else:
        yield Finding(
            "note", "no Python headers: compile=true will not work on the CPU", "sudo apt install python3-dev"
        )


def engines() -> Iterator[Finding]:
    """Builds the engines that are not built yet, and tests each against the float64 definition."""
    from rwkv_train.ops import engines as examined

    for engine in examined():
        if engine.ready:
            error = "" if engine.name == "reference" else f", error {engine.error_ratio:.2f} × the definition's"
            yield Finding("ok", f"{engine.name}: {engine.where} ({engine.seconds:.1f} s{error})")
        else:
            yield Finding("BAD", f"{engine.name}: {engine.problem}", engine.remedy or "")


def devices(cores: int) -> Iterator[Finding]:
    """The processor and the GPUs that torch can use."""
    import torch

    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    # The build (+cpu, +cu130) is named here: PyPI's packages of torch leave it out of their metadata.
    yield Finding(
        "ok", f"CPU: {cores} cores for this process, torch {torch.__version__} uses {threads} threads, {capability}"
    )
    if threads > cores:
        yield Finding("note", f"torch uses more threads than there are cores ({cores})", f"threads={cores}")
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds none (driver?)"
        yield Finding("note", f"no GPU: {why}; training runs on the CPU")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        kind = f"GPU {index}: {card.name}, {memory}, compute capability {card.major}.{card.minor}"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding("ok", f"{kind}, trainer.precision=bf16-mixed or 32-true")
        else:
            yield Finding("note", f"{kind}, no bfloat16", "trainer.precision=32-true")
