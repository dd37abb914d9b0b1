"""Paths and texts as users type them: home directories, long names, bytes that are not UTF-8, commas."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rwkv_train
from rwkv_train.cli.checks import Machine
from rwkv_train.cli.configure import config_builder
from rwkv_train.cli.main import main as cli
from rwkv_train.errors import UserError, UserErrors
from rwkv_train.models import ModelConfig, build_model
from rwkv_train.resources import resource
from rwkv_train.user_path import user_path, utf8_path

LONG = "x" * 300
NOT_UTF8 = os.fsdecode(b"na\xefve")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(build_model(ModelConfig("rwkv4", 1, 8, 256)).state_dict(), "w.pth")
    Path("t.txt").write_text("some text\n" * 50)
    return tmp_path


def test_home_directories_are_those_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [str(user_path(text)) for text in ("~/a", "~nobody-here/a", "a/~", "a,b [c]::d")] == [
        "/home/me/a",
        "~nobody-here/a",
        "a/~",
        "a,b [c]::d",
    ]


def test_names_that_no_file_system_takes() -> None:
    with pytest.raises(
        UserError, match=r"^x{60}… has a name of 300 bytes, more than a file system takes\n  valid: up to"
    ):
        user_path(LONG)
    with pytest.raises(UserError, match="has 4099 bytes, more than"):
        user_path("/".join(["xyz"] * 1025))
    assert os.fsencode(user_path(NOT_UTF8)) == b"na\xefve"
    with pytest.raises(UserError, match=r"is not UTF-8\n  rename it"):
        utf8_path(NOT_UTF8)


COMMANDS = [
    ["status", "{}"],
    ["report", "{}"],
    ["report", "{}", "--push", "csv"],
    ["generate", "{}"],
    ["generate", "w.pth", "--tokenizer", "{}/t.json"],
    ["eval", "{}"],
    ["eval", "w.pth", "--data", "{}"],
    ["eval", "w.pth", "--data", "t.txt", "--out", "{}/e.json"],
    ["export", "{}", "out.pth"],
    ["prepare", "{}/t", "--tokenizer", "bytes", "--out", "s"],
    ["prepare", "inspect", "{}"],
    ["prepare", "verify", "{}"],
    ["prepare", "show", "data=text", "data.path={}"],
    ["train", "data=text", "data.path={}"],
    ["train", "data=store", "data.path={}", "data.tokenizer=bytes"],
    ["train", "data=chat", "data.path={}"],
    ["train", "data.tokenizer={}/t.json"],
    ["train", "init.weights={}"],
    ["train", "resume={}"],
    ["train", "replay={}"],
    ["train", "strategy=deepspeed_2", "deepspeed={}"],
    ["train", "run.root={}/a/b"],
    ["train", "--config-dir", "{}"],
    ["plan", "data=text", "data.path={}"],
]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command))
@pytest.mark.parametrize("path", [LONG, "~nobody-here/x"], ids=["long", "~NAME"])
def test_every_command_names_a_path_that_there_is_not(
    command: list[str], path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = [argument.format(path) for argument in command]
    if typed[0] == "train":
        typed += ["--cfg", "run.name=x"]
        typed[1:1] = ["data.tokenizer=bytes"]
    code = cli(typed)
    out, err = capfd.readouterr()
    if path != LONG and command[-1].startswith("run.root"):
        assert code == 0  # a directory that can be made
        return
    assert (code, len(err.splitlines())) == (2, 2), out + err
    assert path[:14] in err


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_weights_whose_name_is_not_utf8(ending: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "w.pth").rename(here / f"{NOT_UTF8}{ending}")
    assert cli(["export", f"{NOT_UTF8}{ending}", "out.pth"]) == 2
    assert "cannot be read as weights: its name is not UTF-8" in capfd.readouterr().err


RUN_NAMES = {LONG: "has 300 bytes", NOT_UTF8: "is not UTF-8"}


@pytest.mark.parametrize("name", RUN_NAMES)
def test_names_of_runs(name: str, tmp_path: Path) -> None:
    with (
        config_builder([resource("conf")], Machine(cores=2)) as builder,
        pytest.raises(UserErrors, match=f"run.name=.* {RUN_NAMES[name]}\n  give a name in UTF-8 of up to 200 bytes"),
    ):
        builder.build([f"run.root={tmp_path}", f"run.name={name}"])


@pytest.mark.parametrize(("setting", "value"), [("data.path", "a,b.txt"), ("samples.prompt", 'it\'s "so", {x}')])
def test_a_text_with_a_comma_is_quoted_as_the_message_says(
    setting: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a,b.txt").write_text("some text")
    with config_builder([resource("conf")], Machine(cores=2)) as builder:
        rest = ["data=text", *([] if setting == "data.path" else ["data.path='a,b.txt'"])]
        with pytest.raises(UserErrors) as caught:
            builder.build([*rest, f"{setting}=a,b"])
        (advice, *_) = [problem.remedy for problem in caught.value.problems if setting in problem.what]
        assert advice.endswith(f"; one text with a comma: '{setting}=\"a,b\"'")
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        config = builder.build([*rest, f'{setting}="{quoted}"'])
        assert value in (config.data.path, config.samples.prompt)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
@pytest.mark.usefixtures("here")
def test_every_terminal_shows_what_it_can(encoding: str) -> None:
    """One process for several commands: each prints characters that ASCII does not have, and a name in other bytes."""
    Path(f"{NOT_UTF8}.txt").write_text("text × 數 …\n" * 50)
    commands = [
        ["--help"],
        ["generate", "w.pth", "--prompt", f"é數{NOT_UTF8}", "--tokens", "3", "--stop", NOT_UTF8],
        ["eval", "w.pth", "--data", f"{NOT_UTF8}.txt"],
        ["export", "w.pth", "é.pth"],
        ["prepare", f"{NOT_UTF8}.txt", "--tokenizer", "bytes", "--out", "sé", "--workers", "1"],
        ["prepare", "inspect", "sé"],
    ]
    code = "from rwkv_train.cli.main import main\nif __name__ == '__main__':\n"
    code += f"    for command in {commands!r}: assert main(command) == 0"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (b"wrote ?.pth" if encoding == "ascii" else "wrote é.pth".encode()) in done.stdout


def test_paths_of_users_are_made_here_only() -> None:
    """`Path.expanduser` ends with a traceback where there is no such user."""
    package = Path(rwkv_train.__file__).parent
    found = [
        path
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "expanduser"
    ]
    assert found == [package / "user_path.py"]
