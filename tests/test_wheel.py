"""An installed wheel works away from the checkout: it carries conf/ and cuda/, and trains."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> str:
    arguments = [str(part) for part in command]
    result = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    (path,) = folder.glob("rwkv_train-*.whl")
    return path


def test_the_wheel_holds_the_package_with_conf_and_cuda(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = [path for path in (ROOT / "rwkv_train").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    for room in ("conf", "cuda"):
        files = [path for path in (ROOT / room).rglob("*") if path.is_file()]
        expected |= {f"rwkv_train/{path.relative_to(ROOT).as_posix()}" for path in files}
    expected = {name for name in expected if not name.startswith("rwkv_train/conf/local/")}
    assert names == expected
    assert {"rwkv_train/py.typed", "rwkv_train/conf/train.yaml"} <= names
    assert {f"rwkv_train/evaluation/report/uplot/{file}" for file in ("uPlot.iife.min.js", "LICENSE")} <= names


@pytest.mark.slow
def test_a_step_is_trained_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """A bare environment with the wheel in it; what the wheel depends on is lent by this one's site-packages."""
    bare, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    venv.create(bare, symlinks=True)
    elsewhere.mkdir()
    (packages,) = (bare / "lib").glob("python*/site-packages")
    # As a line of a .pth file the folder lends its packages, but not its own .pth files: not the checkout.
    (packages / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for heavy in ("deepspeed", "wandb", "datasets"):  # the default path does without
        (packages / f"{heavy}.py").write_text(f"raise RuntimeError('{heavy} was imported')\n")
    python = bare / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    where = "import rwkv_train.resources as r; print(r.__file__, r.resource('conf'), r.resource('cuda'), sep='\\n')"
    found = run(python, "-c", where, cwd=elsewhere).split()
    assert [Path(path).is_relative_to(packages) for path in found] == [True] * 3

    (elsewhere / "text.txt").write_text("to be or not to be\n" * 200)
    arguments = [
        "data=text",
        "data.path=text.txt",
        "model=tiny",
        "batch.tokens=64",
        "batch.context=32",
        "budget.steps=1",
    ]
    printed = run(bare / "bin" / "rwkv-train", "train", *arguments, "run.name=there", cwd=elsewhere)
    assert (elsewhere / "runs" / "there" / "weights.pth").is_file(), printed
