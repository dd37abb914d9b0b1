"""The commands in README and docs work as they are printed: they run, or, where that is expensive, they are parsed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from rwkv_train.checkpoint.directory import newest
from rwkv_train.cli import launcher
from rwkv_train.cli import main as cli
from rwkv_train.cli.commands import COMMANDS
from rwkv_train.errors import UserErrors
from rwkv_train.training.run import train
from tests.runs import overrides_for, write_text

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPENSIVE = (["doctor"], ["report", "--live"], ["eval", "--tasks"])  # only parsed: command and option

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def blocks(language: str) -> list[str]:
    return [
        block for path in DOCUMENTS for block in re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)
    ]


def commands(program: str = "") -> list[str]:
    """The command lines in the documents that begin with a program."""
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith(program) and not line.startswith("#") and line})


def test_there_is_something_to_test() -> None:
    assert {"make train", "make test", "python train.py --help"} <= set(commands())
    used = {shlex.split(line)[1] for line in commands("rwkv-train ")}
    assert {"prepare", "plan", "status", "report", "generate", "eval", "export"} <= used
    assert commands("sbatch ")
    assert blocks("python")


@pytest.mark.parametrize("command", commands("make "))
def test_make_targets_exist(command: str) -> None:
    target = shlex.split(command)[1]
    assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the documents' commands name: a finished run, texts, files of documents, stores."""
    folder = tmp_path_factory.mktemp("template")
    assert train(launcher.load([*overrides_for(folder, "NAME", "budget.steps=4", "checkpoint.every.steps=2")])) == 0
    for copy in ("OTHER", "A", "B"):
        shutil.copytree(folder / "runs" / "NAME", folder / "runs" / copy)
    for directory in ("books", "corpus", "stores", "parts"):
        (folder / directory).mkdir()
    write_text(folder / "books" / "one.txt")
    write_text(folder / "corpus" / "one.txt")
    lines = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(10))
    (folder / "corpus.jsonl").write_text(lines)
    chat = {"messages": [{"role": "user", "content": "hello " * 40}, {"role": "assistant", "content": "hi " * 80}]}
    (folder / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 20)
    (folder / "more.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), folder / "parts" / "0.parquet")
    for name, tokenizer in (("corpus", "world"), ("mine", "world"), ("code", "bytes")):
        argv = [str(folder / "corpus.jsonl"), "--tokenizer", tokenizer, "--out", str(folder / "stores" / name)]
        assert cli.main(["prepare", *argv]) == 0
    return folder


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template as the current directory, and as the home directory."""
    folder = tmp_path / "here"
    shutil.copytree(template, folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


def run(command: str, folder: Path) -> int:
    """Runs a `rwkv-train` command in this process, or parses it where it is EXPENSIVE; returns the exit code."""
    checkpoint, _ = newest(folder / "runs/NAME/checkpoints")
    _, name, *argv = shlex.split(re.sub(r"runs/NAME/checkpoints/\S+", str(checkpoint), command))
    if "--out" in argv and name == "prepare":
        for file in folder.glob(f"{argv[argv.index('--out') + 1]}.*"):
            file.unlink()
    if any(set(arguments) <= {name, *argv} for arguments in EXPENSIVE):
        entry = COMMANDS[name]
        assert entry.add_arguments is not None
        entry.parser(name).parse_args(argv)
        return 0
    return cli.main([name, *argv])


def exit_code(command: str, folder: Path) -> object:
    try:
        return run(command, folder)
    except SystemExit as end:  # argparse refuses the arguments
        return end.code


@pytest.mark.parametrize("command", commands("rwkv-train "))
def test_commands_run(command: str, here: Path) -> None:
    assert exit_code(command, here) == 0


@pytest.mark.parametrize(
    "command",
    [
        "rwkv-train generate runs/NAME/weights.pth --prompt 'def ' --top-n 40",
        "rwkv-train eval runs/NAME/weights.pth --date ~/books",
        "rwkv-train report runs/NAME --life",
        "rwkv-train export runs/NAME/weights.pth",
        "rwkv-train prepare corpus.jsonl --tokeniser world --out stores/new",
        "rwkv-train plan modle=7b",
        "rwkv-train stats runs/NAME",
        "rwkv-train status runs/NONE",
        "rwkv-train doctor --all",
    ],
)
def test_a_wrong_command_would_be_seen(command: str, here: Path) -> None:
    assert exit_code(command, here) == 2


def overrides(command: str) -> list[str]:
    """What follows train.py or a batch script."""
    arguments = shlex.split(command)
    return arguments[
        next(n for n, argument in enumerate(arguments) if argument.endswith(("train.py", ".sbatch"))) + 1 :
    ]


@pytest.mark.parametrize("command", [*commands("python train.py"), *commands("sbatch ")])
def test_training_commands_are_valid(command: str, here: Path) -> None:
    argv = overrides(command)
    if "--help" in argv:
        assert launcher.main(argv) == 0
    elif "-m" in argv:
        assert launcher.main([*argv, "--cfg"]) == 0
    else:
        assert launcher.load(argv).run.name


def test_a_wrong_training_command_would_be_seen(here: Path) -> None:
    with pytest.raises(UserErrors, match=r"there is no data\.pth"):
        launcher.load(
            overrides("sbatch --nodes=4 scripts/slurm/train.sbatch model=7b data=store data.pth=stores/corpus")
        )


def test_python_blocks_run() -> None:
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})  # raises if a document is wrong


def test_every_path_named_in_the_documents_exists() -> None:
    pattern = re.compile(r"`((?:rwkv_train|cuda|conf|tests|benchmarks|docs|scripts)/[\w./*-]+)`")
    for path in DOCUMENTS:
        for name in pattern.findall(path.read_text()):
            assert list(ROOT.glob(name.rstrip("/"))) or "NAME" in name, f"{path.name} names {name}"
