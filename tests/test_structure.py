"""The rules of the code: the direction of imports, the length of a file, the modules that may read the environment."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rwkv_train"
FOLDERS = ("rwkv_train", "tests", "benchmarks", "scripts", "cuda", "conf", "docs", ".ci")


def files(*suffixes: str) -> list[Path]:
    """All files of the project with these endings."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return sorted([*found, *(path for path in ROOT.iterdir() if path.suffix in suffixes)])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    lint = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    command = [sys.executable, "-c", lint]
    return subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)


def test_imports_go_down_only() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "planted"),
    [
        ("ops/__init__.py", "import rwkv_train.models"),
        ("models/backbone.py", "import lightning"),
        ("config/settings.py", "import torch"),
        ("training/module.py", "import rwkv_train.training.run"),
    ],
)
def test_an_import_upwards_is_found(file: str, planted: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "rwkv_train", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "rwkv_train" / file).open("a") as source:
        source.write(f"\n{planted}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout


def test_every_file_is_one_sitting() -> None:
    """400 lines of Python (train.py 40, a model 250), 450 of C++ and CUDA."""
    limits = {".py": 400, ".cu": 450, ".cpp": 450, ".h": 450, ".cuh": 450}
    for path in files(*limits):
        limit = 250 if path.parent == PACKAGE / "models" else 40 if path == ROOT / "train.py" else limits[path.suffix]
        lines = len(path.read_text().splitlines())
        assert lines <= limit, f"{name(path)} has {lines} lines, at most {limit} can be read in one sitting"


def test_no_folder_or_file_without_a_purpose() -> None:
    nameless = {"utils", "util", "helpers", "misc", "common"}
    assert [name(path) for path in files(".py", ".h", ".cpp", ".cu") if path.stem in nameless] == []


def test_nothing_is_left_to_do() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError\b(?!\()")
    here = Path(__file__)
    found = [
        f"{name(path)}:{number}"
        for path in files(".py", ".h", ".cpp", ".cu", ".yaml")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if path != here and unfinished.search(line)
    ]
    assert found == []


def environment_reads(path: Path) -> Iterator[ast.expr]:
    """What a source does with the process's environment: os.environ, os.getenv, and the like, by any name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "getenvb", "putenv"}:
            yield node
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "environb", "getenv"}, f"{path}: import os"


def test_the_environment_is_read_in_the_launcher_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        reads, lines = list(environment_reads(path)), path.read_text().splitlines()
        if path == PACKAGE / "ops" / "__init__.py":
            assert all("RWKV_OPS" in lines[read.lineno - 1] for read in reads), "ops/ reads RWKV_OPS, and nothing else"
        elif path == PACKAGE / "cluster" / "environment.py":  # the process that the variable is for cannot be passed it
            assert all("PARENT" in lines[read.lineno - 1] for read in reads), "for the ranks that the run starts"
        elif path != PACKAGE / "cli" / "launcher.py":
            assert not reads, f"{name(path)}:{reads[0].lineno} reads the environment, which the launcher does"
    assert [name(path) for path in files(".cpp", ".cu", ".h") if "getenv(" in path.read_text()] == []


MAY_PARSE_JSON = {
    "json_files.py": "the reader itself",
    "watchdog/monitor.py": "imports the standard library only",
    "watchdog/connection.py": "imports the standard library only",
    "training/callbacks/watchdog.py": "a message of the monitor that this process has started",
    "data/chat.py": "lines of documents, in which half a surrogate pair is a fault",
    "data/json_lines.py": "lines of documents, in which half a surrogate pair is a fault",
    "data/prepare/units.py": "lines of documents, in which half a surrogate pair is a fault",
    "data/tables.py": "documents, in which half a surrogate pair is a fault",
}


def json_reads(source: str) -> list[int]:
    """The lines that read JSON with Python's own functions, or torch's files without a check of what they are."""
    unguarded = {"json.load", "json.loads", "json.JSONDecoder", "torch.load"}
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in unguarded)
        or (
            isinstance(node, ast.ImportFrom)
            and node.module in ("json", "torch")
            and {alias.name for alias in node.names} & {"load", "loads", "JSONDecoder"}
        )
    ]


def test_files_are_read_by_the_guarded_readers() -> None:
    """Damaged and hostile files are one kind of error, which json_files.py and models/weights.py make of them."""
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() not in (*MAY_PARSE_JSON, "models/weights.py"):
            assert json_reads(path.read_text()) == [], f"{name(path)}: use rwkv_train.json_files or load_mapped"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import json\njson.loads(text)", [2]),
        ("import json\nlist(map(json.loads, lines))", [2]),
        ("from json import loads", [1]),
        ("import torch\ntorch.load(path)", [2]),
        ("import json\njson.dumps(value)", []),
    ],
)
def test_a_planted_read_is_found(source: str, found: list[int]) -> None:
    assert json_reads(source) == found


def test_consoles_print_foreign_text_as_it_is() -> None:
    """Paths, messages and documents hold square brackets, which rich would take for markup."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert path == PACKAGE / "console.py" or not re.search(r"\bConsole\(", text), f"{name(path)}: make_console"
        assert not re.search(r"\[/?(bold|dim|red|green|yellow)\b", text), f"{name(path)} has markup: use style="


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("rwkv_train.config, rwkv_train.errors", "torch lightning deepspeed numpy hydra"),
        (
            "rwkv_train.cli.main, rwkv_train.cli.launcher, rwkv_train.data",
            "torch lightning deepspeed matplotlib wandb datasets",
        ),
        ("rwkv_train.models.detect, rwkv_train.models.registry", "torch numpy lightning"),
        ("rwkv_train.models, rwkv_train.ops", "lightning deepspeed hydra wandb datasets matplotlib"),
        ("rwkv_train.training.run", "deepspeed wandb datasets"),
    ],
)
def test_what_an_import_brings_with_it(modules: str, unwanted: str) -> None:
    check = f"import sys, {modules}; print(*[name for name in '{unwanted}'.split() if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_links_in_the_documents_lead_somewhere() -> None:
    broken = [
        f"{name(path)}: {target}"
        for path in files(".md")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
        if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists()
    ]
    assert broken == []


# Attributes of other libraries' objects that training/ sets, and what each does there.
THEIRS = {
    "trainer.should_stop": "Lightning ends its loop after the step",
    "trainer.limit_val_batches": "Lightning leaves the validation out",
    "trainer._signal_connector.register_signal_handlers": "Lightning leaves signals to us",
    "trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor": "the same: no broadcast and no wait in each pass",
    "loop._batches_that_stepped": "Lightning's counter of steps, which load_state_dict leaves out",
    "optimizer.found_inf": "torch's fused AdamW skips the update on the device",
    "self.engine_optimizer.optimizer.found_inf": "the same, inside DeepSpeed's engine",
    "deepspeed.ops.__compatible_ops__": "DeepSpeed probes and builds no operators on CPUs",
    "ctx.factor": "torch.autograd keeps values for the backward pass on ctx",
    "ctx.shape": "the same",
    "ctx.to_hidden": "the same",
    "ctx.to_weight": "the same",
    "monitor.returncode": "subprocess.Popen warns of a child that it has not seen end",
}


def writes_into_others(source: str) -> list[tuple[int, str]]:
    """(line, target) of assignments to attributes of objects that the function has not made itself.

    A function may set attributes of `self` and `cls`, and of what it has just made by calling a class.
    """
    found: set[tuple[int, str]] = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        own = {"self", "cls"}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                maker = ast.unparse(node.value.func).rpartition(".")[2]
                own |= {t.id for t in node.targets if isinstance(t, ast.Name) and maker.lstrip("_")[:1].isupper()}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if not (isinstance(node.value, ast.Name) and node.value.id in own):
                    found.add((node.lineno, ast.unparse(node)))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "object.__setattr__"):
                target = node.args[0]
                if not (isinstance(target, ast.Name) and target.id in own):
                    found.add((node.lineno, ast.unparse(node.func) + "(" + ast.unparse(target) + ")"))
    return sorted(found)


def test_a_run_is_wired_by_arguments() -> None:
    """In training/ no object writes another object's attributes: constructors, or one method for each purpose."""
    found = {
        f"{name(path)}:{line} {target}": target
        for path in (PACKAGE / "training").rglob("*.py")
        for line, target in writes_into_others(path.read_text())
    }
    zero = "setattr(module)"  # torch.nn.Module's way to replace a parameter, in strategy/zero.py
    assert [where for where, target in found.items() if target not in (*THEIRS, zero)] == []
    assert set(THEIRS) - set(found.values()) == set(), "an entry of the list that nothing needs any more"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(strategy):\n    strategy.attempt = 1", ["strategy.attempt"]),
        ("def f(self):\n    self.spent.hours += 1", ["self.spent.hours"]),
        ("def f(trainer):\n    s = cast(S, trainer.strategy)\n    s.a, s.b = 1, 2", ["s.a", "s.b"]),
        ("def f(x):\n    setattr(x, 'a', 1)", ["setattr(x)"]),
        ("def f(self):\n    self.a = 1\n    made = Thing()\n    made.a = 1", []),
    ],
)
def test_a_planted_write_is_found(source: str, expected: list[str]) -> None:
    assert [target for _, target in writes_into_others(source)] == expected
