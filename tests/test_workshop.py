"""The Makefile and .ci/run: their messages on a machine where something is missing; set-up is done once."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import LONGEST

ROOT = Path(__file__).parents[1]
SHELL = ("sh", "bash", "make", "grep", "sed", "column", "touch", "mkdir", "dirname", "printf")

# Replaces python3: refuses the modules named in the braces, and makes an environment that installs nothing.
PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) exit {version} ;;
  *ensurepip*) exit {venv} ;;
  --version) echo Python 3.9.2 ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip"*) echo "$@" >> installed ;;
esac
"""

Machine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """`machine(command_line, version=0, venv=0, without=[…])`: runs a command in a copy of the checkout."""
    (tmp_path / "bin").mkdir()
    for tool in (*SHELL, "cp"):
        if found := shutil.which(tool):
            (tmp_path / "bin" / tool).symlink_to(found)
    for file in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)

    def run(
        command_line: str, version: int = 0, venv: int = 0, without: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        for tool, text in (("python3", PYTHON.format(version=version, venv=venv)), ("g++", "#!/bin/sh\n")):
            path = tmp_path / "bin" / tool
            path.unlink(missing_ok=True)
            if tool not in without:
                path.write_text(text)
                path.chmod(0o755)
        environment = {"PATH": str(tmp_path / "bin")}
        return subprocess.run(command_line.split(), cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_setting_up_happens_once(machine: Machine, tmp_path: Path) -> None:
    first = machine("make setup")
    assert first.returncode == 0, first.stdout + first.stderr
    assert (tmp_path / "installed").read_text() == "-m pip install --quiet -c constraints.txt -e .[test,dev]\n"
    assert "missing" not in first.stdout
    second = machine("make setup")
    assert "install" not in second.stdout
    assert "pip" not in (tmp_path / "installed").read_text().partition("\n")[2]


def test_torch_comes_from_where_the_user_says(machine: Machine, tmp_path: Path) -> None:
    machine("make setup TORCH_INDEX=some-index")
    first, _ = (tmp_path / "installed").read_text().splitlines()
    assert re.fullmatch(r"-m pip install --quiet --index-url some-index torch==2\.\d+\.\d+", first)


def test_a_missing_tool_is_named_with_its_package(machine: Machine, tmp_path: Path) -> None:
    assert (
        "python3 is missing: apt-get install python3 python3-venv" in machine("make setup", without=("python3",)).stdout
    )
    assert "venv is missing: apt-get install python3-venv" in machine("make setup", venv=1).stdout
    assert (
        "Python 3.9.2 is not supported, 3.11 to 3.13 are: make PYTHON=python3.11"
        in machine("make setup", version=1).stdout
    )
    assert not (tmp_path / ".venv").exists(), "nothing is begun that cannot be ended"
    compiler = machine("make setup", without=("g++",))
    assert compiler.returncode == 0
    assert "g++ is missing, training will be slow: apt-get install g++" in compiler.stdout
    for tool in ("python3", "g++"):
        ci = machine("bash .ci/run", without=(tool,))
        assert ci.returncode == 2
        assert ci.stdout == f"{tool} is missing: apt-get install python3 python3-venv g++ make\n"


def test_make_lists_every_target(machine: Machine) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    phony = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[0].split()
    assert sorted(targets) == sorted(phony)
    listed = machine("make").stdout
    assert re.findall(r"^  make ([a-z-]+) ", listed, flags=re.MULTILINE) == targets


def test_ci_says_how_long_each_part_took(machine: Machine) -> None:
    result = machine("bash .ci/run")
    # The stand-in for python3 makes an environment without lint's tools, so the second part ends it.
    assert result.returncode != 0
    assert "== make setup" in result.stdout
    assert "== make lint" in result.stdout
    assert "== make test" not in result.stdout, "it stops at the first failure"


def test_the_files_that_take_longest_are_there_and_come_first(request: pytest.FixtureRequest) -> None:
    files = [ROOT / "tests" / name for name in LONGEST]
    assert [file for file in files if not file.is_file()] == []
    assert "--dist loadfile --no-loadscope-reorder" in (ROOT / "Makefile").read_text()
    collected = list(dict.fromkeys(item.path for item in request.session.items))
    first = [file for file in files if file in collected]
    assert collected[: len(first)] == first
