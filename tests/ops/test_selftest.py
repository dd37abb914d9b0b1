"""The self-test behind `rwkv-train doctor`: it covers every operator, and finds engines that are really wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_train import ops
from rwkv_train.ops import build, registration, selftest
from rwkv_train.ops.build import BuildError, CppEngine
from rwkv_train.ops.families import FAMILIES
from rwkv_train.ops.registration.declaration import KERNELS

ROOT = Path(__file__).resolve().parents[2]


def test_the_report_on_this_machine() -> None:
    definition, *libraries = ops.engines()
    assert definition.name == "reference"
    assert [report.name for report in libraries] == [f"cpp {family}" for family in FAMILIES]
    for report in libraries:
        assert report.ready, report
        assert report.problem is None
        assert report.where is not None
        assert Path(report.where).exists()
        assert report.error_ratio is not None
        assert 0.1 < report.error_ratio < selftest.MAX_ERROR_RATIO


class Calls(TorchDispatchMode):
    """Notes each of our operators that runs, in each storage dtype, with and without starts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[str, torch.dtype, bool]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "rwkv_train":
            names = [argument.name for argument in function._schema.arguments]
            starts = "starts" in names and args[names.index("starts")] is not None
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            dtype = min((x.dtype for x in tensors if x.is_floating_point()), key=lambda kind: kind.itemsize)
            self.seen.add((function._schema.name.split("::")[1], dtype, starts))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_operator_runs_in_every_dtype_with_and_without_starts(family: str) -> None:
    engine = FAMILIES[family].cpp
    assert engine.load()
    with Calls() as calls:
        selftest.worst_error(engine)
    expected = set()
    for name in KERNELS[family]:
        takes_starts = "starts" in str(getattr(torch.ops.rwkv_train, name).default._schema)
        for dtype in engine.dtypes:
            expected |= {(name, dtype, starts) for starts in ([False, True] if takes_starts else [False])}
    assert calls.seen == expected


def test_an_error_in_any_result_of_any_operator_is_found() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.wrong_engines"], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for planted, (ratio, result) in found.items():
        operator, _, what = planted.partition(": ")
        if what == "nothing":
            assert ratio <= selftest.MAX_ERROR_RATIO, (planted, ratio, result)
            continue
        assert ratio > selftest.MAX_ERROR_RATIO, f"{planted} is not caught: {ratio:.2f} in {result}"
        assert operator.removesuffix("_backward") in result
        assert what.startswith("result") or what.removeprefix("only ") in result
    planted = {name.split(":")[0] for name in found}
    assert planted == {*FAMILIES, *(name for kernels in KERNELS.values() for name in kernels)}
    assert {f"wkv4_backward: result {i}" for i in range(5)} <= set(found)


@pytest.mark.parametrize(
    ("family", "source", "right", "wrong", "operator"),
    [
        ("wkv4", "wkv4_cpu.cpp", "next.x * gd[c] - out.x * g * y", "next.x * gd[c] + out.x * g * y", "wkv4"),
        ("elementwise", "elementwise_cpu.cpp", "* (e * s * s)", "* (e * s)", "sigmoid_gate"),
    ],
)
def test_doctor_reports_a_library_that_was_compiled_from_wrong_sources(
    tmp_path: Path, family: str, source: str, right: str, wrong: str, operator: str
) -> None:
    """A sign in the gradient of wkv4, and a factor in that of sigmoid_gate: the other family stays right."""
    sources, home = tmp_path / "cuda", tmp_path / "home"
    shutil.copytree(build.source_directory(), sources)
    home.mkdir()
    text = (sources / source).read_text()
    assert text.count(right) == 1
    (sources / source).write_text(text.replace(right, wrong))
    other = next(name for name in FAMILIES if name != family)
    code = (
        "import sys; from pathlib import Path; from rwkv_train.ops import build; "
        "from rwkv_train.ops.families import FAMILIES; from rwkv_train.cli.doctor import examine; "
        f"FAMILIES[{other!r}].cpp.load(); "  # from the right sources, where this machine has it already
        f"build.source_directory = lambda: Path({str(sources)!r}); build.FLAGS = build.FLAGS.replace('-O3', '-O0'); "
        f"build.SETTINGS.cache = Path({str(home)!r}); sys.exit(examine(1))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RWKV_OPS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    bad = [line for line in done.stdout.splitlines() if line.startswith("  BAD")]
    assert len(bad) == 1, done.stdout
    assert bad[0].startswith(f"  BAD   cpp {family}: its results are wrong: error ")
    assert f" of {operator}" in bad[0]
    assert "RWKV_OPS=reference trains correctly meanwhile" in done.stdout
    assert f"  ok    cpp {other}: " in done.stdout


def test_a_result_that_is_not_a_number_counts_as_wrong() -> None:
    exact, nan = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, torch.nan, 1.0])
    assert selftest._error_ratio(exact, torch.ones(3), nan) == float("inf")


def test_an_engine_that_is_missing_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = CppEngine("wkv4", (), error=BuildError("no C++ compiler", "sudo apt install g++"))
    report = selftest._examine(missing)
    assert (report.ready, report.where, report.problem) == (False, None, "no C++ compiler")
    assert report.remedy == "sudo apt install g++"

    def refuse(engine: object) -> tuple[float, str]:
        raise RuntimeError("rwkv_train: k has the wrong dtype\nand a stack of frames")

    monkeypatch.setattr(selftest, "worst_error", refuse)
    report = selftest._examine(CppEngine("wkv4", (), library=Path("wkv4.so")))
    assert not report.ready
    assert report.problem == "its self-test failed: rwkv_train: k has the wrong dtype"
    assert report.error_ratio is None


def test_every_family_has_cases() -> None:
    assert list(registration.SELF_TEST_CASES) == list(FAMILIES)
    assert all(registration.SELF_TEST_CASES.values())
