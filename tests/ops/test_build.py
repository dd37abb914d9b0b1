"""Building the C++ engine: at first use, by several processes at once, after a kill, without a compiler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rwkv_train.ops import build
from rwkv_train.ops.build import CppEngine

CALL = (
    "import torch; from rwkv_train import ops; ops.relu_squared(torch.ones(3)); "
    "from rwkv_train.ops.families import FAMILIES; "
)
QUICKLY = "from rwkv_train.ops import build; build.FLAGS = build.FLAGS.replace('-O3', '-O0'); "
REPORT = CALL + "print('library', FAMILIES['elementwise'].cpp.library)"


def start(code: str, home: Path, **environment: str) -> subprocess.Popen[str]:
    """Python on `code` with a home of its own, where no engine is built yet."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RWKV_OPS", "HOME")}
    variables = {**inherited, "HOME": str(home), "PYTHONWARNINGS": "default", **environment}
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", code], env=variables, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    return output, errors


@pytest.fixture
def tiny_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CppEngine:
    """One whose only source is compiled in no time; it registers nothing."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "tiny.cpp").write_text("extern int tiny;\nint tiny = 3;\n")
    monkeypatch.setattr(build, "source_directory", lambda: tmp_path / "sources")
    monkeypatch.setattr(build.SETTINGS, "cache", tmp_path / "cache")
    return CppEngine("tiny", ("tiny.cpp",))


def test_two_processes_at_once_build_one_library_with_a_stripped_path(tmp_path: Path) -> None:
    """And it is that of the family whose operator was called; the other one is not compiled."""
    both = [start(QUICKLY + REPORT, tmp_path, PATH="/nowhere") for _ in range(2)]
    lines = {line for process in both for line in finish(process)[0].splitlines()}
    libraries = list((tmp_path / ".cache" / "rwkv_train").rglob("*.so"))
    assert [path.name for path in libraries] == ["rwkv_train_cpp_elementwise.so"]
    assert lines == {f"library {libraries[0]}"}
    assert {path.name for path in libraries[0].parent.iterdir()} == {libraries[0].name, "lock"}


def test_nothing_is_built_at_import(tmp_path: Path) -> None:
    finish(start("import rwkv_train.ops", tmp_path))
    assert not list(tmp_path.rglob("*"))


def test_a_killed_builder_leaves_nothing_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", build.FLAGS.replace("-O3", "-O0"))
    engine = CppEngine("elementwise", ("elementwise_cpu.cpp",))
    code = (
        f"{QUICKLY} import pathlib; "
        f"build.CppEngine('elementwise', ('elementwise_cpu.cpp',)).build(pathlib.Path({str(tmp_path)!r}))"
    )
    process = start(code, tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("build.ninja")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.rglob("*.so"))
    assert engine.build(tmp_path).exists()
    assert not list(tmp_path.rglob("build-*"))


def test_without_a_compiler_one_warning_and_the_definition(tmp_path: Path) -> None:
    """One for all families, as the reason is one."""
    code = (
        "from rwkv_train.ops import build; build.COMPILERS = ('no-such-compiler',); "
        "import torch; from rwkv_train import ops; one = torch.ones(4); "
        "x = torch.randn(2, 70, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(); "
        "mixed = lambda: ops.relu_squared(ops.shift_mix(x, None, x[0, 0])[0]); "
        "f = lambda: ops.sigmoid_gate(ops.wkv4(-one, one, x, x)[0], mixed()); "
        "engine = torch.autograd.grad(f().sum(), x)[0]; ops.ENGINE = 'reference'; "
        "print(torch.allclose(engine, torch.autograd.grad(f().sum(), x)[0], rtol=1e-5, atol=1e-6))"
    )
    output, errors = finish(start(code, tmp_path))
    assert output == "True\n"
    assert errors.count("RuntimeWarning") == 1
    message = errors[errors.index("RuntimeWarning") :].splitlines()
    assert message[0].endswith("the cpp engine is not available: operators run by their definition, far slower")
    assert message[1:3] == ["  why: no C++ compiler (no-such-compiler) was found", "  try: sudo apt install g++"]


def test_a_demanded_engine_that_is_not_available_is_an_error(tmp_path: Path) -> None:
    code = "from rwkv_train.ops import build; build.COMPILERS = ('no-such-compiler',); " + CALL
    process = start(code, tmp_path, RWKV_OPS="cpp")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "UserError: RWKV_OPS=cpp demands an engine that is not available: no C++ compiler" in errors
    process = start(CALL, tmp_path, RWKV_OPS="fast")
    _, errors = process.communicate(timeout=60)
    assert "UserError: RWKV_OPS=fast names no engine\n  valid are auto, reference, cpp, cuda" in errors


def test_the_definition_on_demand_builds_nothing(tmp_path: Path) -> None:
    output, _ = finish(start(REPORT, tmp_path, RWKV_OPS="reference"))
    assert output == "library None\n"
    assert not list(tmp_path.rglob("*"))


def test_an_error_of_the_compiler_is_shown_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "broken.cpp").write_text("int f() { return nothing; }\n")
    monkeypatch.setattr(build, "source_directory", lambda: sources)
    with pytest.raises(build.BuildError) as caught:
        CppEngine("broken", ("broken.cpp",)).build(tmp_path)
    assert "nothing" in caught.value.why
    assert "\n" not in caught.value.why
    assert "ninja -C" in caught.value.command


def test_a_home_that_cannot_be_written_is_left_alone(
    tmp_path: Path, tiny_engine: CppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setattr(Path, "home", lambda: blocked)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(build.SETTINGS, "cache", None)
    library = tiny_engine.build()
    assert library.is_relative_to(tmp_path / f"rwkv_train-{os.getuid()}")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(blocked))
    with pytest.raises(build.BuildError, match="nowhere to write"):
        tiny_engine.build()


def test_a_damaged_library_is_built_again(tiny_engine: CppEngine) -> None:
    damaged = tiny_engine.build()
    damaged.write_bytes(b"cut off")
    assert tiny_engine.build() == damaged, "the damage is found when the library is loaded"
    assert tiny_engine.load()
    assert tiny_engine.library == damaged
    assert damaged.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("fault", ["others may write", "another owner", "a link of another owner", "a library's"])
def test_a_cache_that_others_can_change_is_not_used(
    fault: str, tmp_path: Path, tiny_engine: CppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next directory is: a library that is loaded runs with this user's rights."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache, owner = tmp_path / "cache", 1234 if os.getuid() == 0 else os.getuid()
    if os.getuid():
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    cache.mkdir()
    if fault == "others may write":
        cache.chmod(0o770)
    elif fault == "another owner":
        os.chown(cache, owner, -1)
    elif fault == "a library's":
        (cache / tiny_engine.build().parent.name).chmod(0o707)
    else:
        cache.rename(tmp_path / "target")
        cache.symlink_to(tmp_path / "target")
        os.chown(cache, owner, -1, follow_symlinks=False)
    refused = next(cache.iterdir()) if fault == "a library's" else cache
    with pytest.raises(OSError, match=r"belongs to user|chmod go-w"):
        build._safe_directory(refused)
    if os.getuid() != owner + 1:  # else its own home would be another user's, too
        with pytest.warns(RuntimeWarning, match=f"no engine is compiled or loaded in {cache}"):
            library = tiny_engine.build()
        assert library.is_relative_to(tmp_path / "home" / ".cache" / "rwkv_train")
