"""scripts/pythons.py: the interpreters that it finds, its message about missing ones, and its end after a failure."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# An interpreter of version 9.8 whose environments "install" a program that writes what examine() looks for.
PYTHON = """#!/bin/sh
case "$*" in
  *ensurepip*) echo 9.8 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$(dirname "$0")/program" "$3/bin/rwkv-train" ;;
  "-m pip"*) echo "$@" >> "$(dirname "$0")/pip" ;;
esac
"""
PROGRAM = """#!/bin/sh
[ "$1" = "{failing}" ] && exit 3
case "$*" in
  *run.name=*) mkdir -p runs/smoke runs/store; touch runs/smoke/metrics.jsonl runs/store/weights.pth ;;
  export*) touch "$3" ;;
esac
"""


def run(checkout: Path, failing: str = "nothing", *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a copy of the script whose only interpreter, and its pyenv, are made up."""
    for folder in ("scripts", "bin", "pyenv/versions/9.7.1/bin"):
        (checkout / folder).mkdir(parents=True, exist_ok=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/pythons.py"):
        (checkout / name).write_text((ROOT / name).read_text())
    shim = "#!/bin/sh\necho 'pyenv: python9.7: command not found'; exit 127\n"
    programs = {"python9.8": PYTHON, "python9.7": shim, "program": PROGRAM.format(failing=failing)}
    for name, text in programs.items():
        (checkout / "bin" / name).write_text(text)
        (checkout / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "PYENV_ROOT": str(checkout / "pyenv")}
    command = [sys.executable, str(checkout / "scripts" / "pythons.py"), *(arguments or ("9.7", "9.8"))]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_missing_interpreter_is_named_and_the_others_run(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    skipped, passed = result.stdout.splitlines()[-2:]
    assert skipped == "Python 9.7: skipped, it is not on this machine"
    assert passed.startswith(f"Python 9.8: passed ({tmp_path / 'bin' / 'python9.8'}; ")
    installed = (tmp_path / ".pythons" / "9.8" / "bin" / "pip").read_text()
    assert installed == f"-m pip install -qq --no-compile -c {tmp_path / 'constraints.txt'} {tmp_path}\n"


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path)
    _, second = (tmp_path / ".pythons" / "9.8" / "bin" / "pip").read_text().splitlines()
    assert "--no-deps --force-reinstall" in second, "the package of this checkout, and nothing else"
    assert run(tmp_path, "nothing", "9.8", "--remove").returncode == 0
    assert not (tmp_path / ".pythons" / "9.8").exists()


@pytest.mark.parametrize("failing", ["train", "prepare", "export"])
def test_a_command_that_fails_is_named(tmp_path: Path, failing: str) -> None:
    result = run(tmp_path, failing)
    assert result.returncode == 1
    assert f"failed with exit code 3: {tmp_path}/.pythons/9.8/bin/rwkv-train {failing} " in result.stderr


def test_the_versions_are_those_of_the_package() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        pythons = importlib.import_module("pythons")
    finally:
        sys.path.pop(0)
    assert pythons.supported() == ["3.11", "3.12", "3.13"]
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in pythons.supported()
