"""What README and docs tell a reader to type works: commands are settled, make targets exist, Python blocks run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rwkv_train.cli import launcher
from rwkv_train.cli import main as cli
from rwkv_train.data.indexed import IndexedStore
from rwkv_train.data.manifest import Manifest, write_manifest
from rwkv_train.data.tokenizers import load_tokenizer
from tests.data.test_indexed import ours
from tests.runs import write_text

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return [
        block for path in DOCUMENTS for block in re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)
    ]


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return sorted({line for line in lines if line and not line.startswith("#")})


def test_there_is_something_to_test() -> None:
    assert {"make train", "make test", "python train.py --help"} <= set(commands())
    assert blocks("python")


@pytest.mark.parametrize("command", [line for line in commands() if "train.py" in line])
def test_training_commands_settle(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books").mkdir()
    write_text(tmp_path / "books" / "one.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"data\.path=(stores/\w+)", command):
        (tmp_path / "stores").mkdir()
        store = IndexedStore(ours(tmp_path / name))
        identity = load_tokenizer("world").identity
        write_manifest(store.stem, Manifest("world", [], identity, 4, len(store), 1, 9, store.fingerprint(), {}, []))
    words = shlex.split(command)
    words = words[words.index("train.py") + 1 :]
    if "--help" in words:
        assert launcher.main(words) == 0
    elif "-m" in words:
        assert launcher.main([*words, "--cfg"]) == 0
    else:
        assert launcher.load(words).run.name


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith(("make ", "rwkv-train "))])
def test_targets_and_tools_exist(command: str) -> None:
    tool, word, *_ = shlex.split(command)
    if tool == "make":
        assert re.search(rf"^{word}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        try:
            code: object = cli.main([word, "--help"])
        except SystemExit as ended:
            code = ended.code
        assert code == 0


def test_python_blocks_run() -> None:
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})  # raises where the README is wrong


def test_every_path_named_in_the_documents_exists() -> None:
    pattern = re.compile(r"`((?:rwkv_train|cuda|conf|tests|benchmarks|docs|scripts)/[\w./*-]+)`")
    for path in DOCUMENTS:
        for name in pattern.findall(path.read_text()):
            assert list(ROOT.glob(name.rstrip("/"))) or "rwkvN" in name, f"{path.name} names {name}"
