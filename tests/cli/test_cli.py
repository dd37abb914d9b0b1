"""`rwkv-train`: its commands and their arguments, and the report of the doctor."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rwkv_train import __version__, ops, resources
from rwkv_train.cli import doctor, launcher
from rwkv_train.cli import main as cli
from rwkv_train.cli.commands import COMMANDS
from rwkv_train.errors import UserError
from rwkv_train.inference import generate
from rwkv_train.inference.generate import GenerateOptions
from rwkv_train.inference.sampling import Sampling
from rwkv_train.ops import EngineReport, build
from rwkv_train.ops.families import FAMILIES


def test_train_is_train_py(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[str]] = []

    def main(argv: Sequence[str]) -> int:
        seen.append(list(argv))
        return 7

    monkeypatch.setattr(launcher, "main", main)
    assert cli.main(["train", "--help", "model=7b", "-m"]) == 7
    assert seen == [["--help", "model=7b", "-m"]]


def test_generate_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[GenerateOptions] = []

    def run(options: GenerateOptions) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr(generate, "run", run)
    arguments = ["--prompt", "def ", "--temperature", "0.5", "--top-p", "0.8", "--tokens", "9", "--seed", "3"]
    arguments += ["--top-k", "40", "--repetition-penalty", "1.2", "--stop", "\n", "--stop", "x", "--until-end"]
    arguments += ["--batch", "4", "--json", "--tokenizer", "world", "--device", "auto"]
    assert cli.main(["generate", "w.pth", *arguments]) == 0
    assert cli.main(["generate", "w.pth"]) == 0
    given = GenerateOptions(
        "w.pth", "def ", 9, Sampling(0.5, 0.8, 40, 1.2), 3, "world", ["\n", "x"], True, 4, True, "auto"
    )
    assert seen == [given, GenerateOptions("w.pth", "", 500, Sampling(1.0, 0.9), stops=[])]
    assert cli.main(["generate", "w.pth", "--top-p", "0"]) == 2
    assert capsys.readouterr().err == "error: --top-p 0.0 is out of range\n  valid: above 0, up to 1\n"

    def refuse(*arguments: object) -> int:
        raise UserError("there is no file w.pth", "give another")

    monkeypatch.setattr(generate, "run", refuse)
    assert cli.main(["generate", "w.pth"]) == 2
    assert capsys.readouterr().err == "error: there is no file w.pth\n  give another\n"


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no command is given\n  valid: train, prepare, plan, ")
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("error: trian: there is no such command\n  nearest: train; valid: ")
    with pytest.raises(SystemExit) as end:
        cli.main(["generate"])
    assert end.value.code == 2
    assert "usage: rwkv-train generate" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    listed = re.findall(r"^  ([a-z-]+) +\S", shown.split("commands:\n")[1], re.MULTILINE)
    assert listed == list(COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rwkv-train {__version__}\n"


EXAMPLES = [example for command in COMMANDS.values() for example in command.examples]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_a_command_are_valid_and_in_its_help(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *argv = shlex.split(example)
    COMMANDS[name].parser(name).parse_args(argv)
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"\n  rwkv-train {example}\n" in capsys.readouterr().out


class Installed(dict[str, str]):
    """Metadata of a package as importlib.metadata shows them."""

    def get_all(self, name: str) -> list[str]:
        return ["torch>=2,<4", "nothing-like-this>=1", "numpy<1", 'pytest>=9; extra == "test"']


def healthy() -> list[EngineReport]:
    return [EngineReport("reference", True, "reference.py", None, None, 1.0, 0.0)]


def test_the_doctor_reads_the_tested_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "metadata", lambda name: Installed({"Requires-Python": ">=3.11,<3.14"}))
    python, good, missing, old = list(doctor.versions())  # pytest is an extra's
    assert (python.verdict, good.verdict) == ("ok", "ok")
    assert good.what == f"torch {metadata.version('torch')} (<4,>=2)"
    assert (missing.verdict, missing.remedy) == ("BAD", "pip install 'nothing-like-this>=1'")
    assert old.verdict == "BAD"
    assert "is outside the tested <1" in old.what
    monkeypatch.setattr(metadata, "metadata", lambda name: Installed({"Requires-Python": "<3"}))
    assert next(doctor.versions()).verdict == "BAD"


def test_the_doctor_names_the_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's CUDA build of 2.13.0 says `2.13.0` in its metadata, and `2.13.0+cu130` only in the module."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(metadata, "metadata", lambda name: Installed({"Requires-Python": ">=3.11,<3.14"}))
    assert list(doctor.versions())[1].what == "torch 2.13.0 (<4,>=2)"
    assert "torch 2.13.0+cu130 uses" in next(doctor.devices(2)).what


def test_a_healthy_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "versions", lambda: iter([doctor.Finding("ok", "all")]))
    monkeypatch.setattr(build, "find_compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(ops, "engines", healthy)
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "No problems found." in shown
    assert "C++ compiler /usr/bin/g++" in shown
    assert f"{resources.cpu_cores()} cores for this process" in shown


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none() -> str:
        raise build.BuildError("no C++ compiler was found", "sudo apt install g++")

    broken = EngineReport("cpp wkv4", False, None, "no C++ compiler was found", "sudo apt install g++", None, 0.1)
    monkeypatch.setattr(doctor, "versions", lambda: iter([]))
    monkeypatch.setattr(build, "find_compiler", none)
    monkeypatch.setattr(ops, "engines", lambda: [*healthy(), broken])
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("BAD   ") == 2
    assert "cpp wkv4: no C++ compiler was found\n        sudo apt install g++" in shown
    assert "2 problems need attention." in shown


def test_the_doctor_of_this_machine() -> None:
    assert [finding.verdict for finding in doctor.engines()] == ["ok"] * (1 + len(FAMILIES))
    assert {finding.verdict for finding in doctor.devices(resources.cpu_cores())} <= {"ok", "note"}


def test_an_interrupted_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", interrupt)
    assert cli.main(["generate", "w.pth"]) == 130


def test_the_script_of_the_wheel_is_there() -> None:
    assert 'rwkv-train = "rwkv_train.cli.main:main"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
