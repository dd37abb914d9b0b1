"""The launcher: help, flags, exit codes, several runs, time; that nothing is written when a setting is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from rwkv_train.cli import launcher
from rwkv_train.cli.conf_folders import ConfFolders
from rwkv_train.cli.help import PLAN, TRAIN, help_text
from rwkv_train.cluster.rank_info import PARENT, RankInfo
from rwkv_train.config import Config
from rwkv_train.config.schema import as_tree, schema
from rwkv_train.errors import UserError
from rwkv_train.resources import resource
from tests.runs import save_weights

ROOT = Path(__file__).parents[2]


def trained(monkeypatch: pytest.MonkeyPatch, outcome: Callable[..., int]) -> None:
    """Replaces training."""
    room = types.ModuleType("rwkv_train.training.run")
    room.train = outcome  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rwkv_train.training.run", room)


def refuse(config: Config, rank_info: RankInfo) -> int:
    raise UserError("the data is shorter than one context", "give more of it")


def interrupt(config: Config, rank_info: RankInfo) -> int:
    raise KeyboardInterrupt


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Config] = []

    def note(config: Config, rank_info: RankInfo) -> int:
        seen.append(config)
        return 3

    trained(monkeypatch, note)
    assert launcher.main(["seed=5"]) == 3
    assert seen[0].seed == 5
    trained(monkeypatch, refuse)
    assert launcher.main([]) == 2
    assert capsys.readouterr().err == "error: the data is shorter than one context\n  give more of it\n"
    trained(monkeypatch, interrupt)
    assert launcher.main([]) == 130


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ({}, f"{launcher.OPENMP_SPINS} None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
    ],
)
def test_waiting_threads_give_up_their_cores_unless_set_otherwise(given: dict[str, str], settled: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    seen = "print(*[os.environ.get(name) for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')], 'torch' in sys.modules)"
    code = f"import os, sys; from rwkv_train.cli import launcher; launcher.main(['--help']); {seen}"
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{settled} False", done.stderr


def test_help_may_be_cut_short() -> None:
    done = subprocess.run(
        f"{sys.executable} train.py --help | head -1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout[:6], done.stderr) == ("usage:", "")


def test_all_errors_in_one_block(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["seed=x", "modle=7b", "optim=sgd"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line[:12] for line in shown.err.splitlines() if line.startswith("error: ")] == [
        "error: optim",
        "error: seed=",
        "error: modle",
    ]


def test_only_rank_0_reports(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert launcher.rank_info().rank == 1
    assert launcher.main(["seed=x"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launcher.main(["seed=x"]) == 2
    assert "seed=x is not valid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "7b"], "--model: there is no such flag\n  settings are typed without dashes"),
        (["--config-dir", "/no/such"], "--config-dir /no/such: there is no such directory"),
        (["-m", "seed=interval(0,1)"], "-m: "),
    ],
)
def test_flags_that_are_wrong(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(argv) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_cfg_prints_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--cfg", "model=nano"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == as_tree(launcher.load(["model=nano"]))


def test_multirun_checks_all_and_then_runs_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Sequence[str]] = []

    def record(command: Sequence[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        runs.append(command)
        return subprocess.CompletedProcess(command, 3 if "seed=2" in command else 0)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    assert launcher.main(["-m", "model=nano,tiny", "seed=1,2", "+callbacks.a._target_=lightning.B"]) == 3
    lines = [
        ["model=" + size, f"seed={seed}", "+callbacks.a._target_=lightning.B"]
        for size in ("nano", "tiny")
        for seed in (1, 2)
    ]
    assert runs == [[sys.executable, "/somewhere/train.py", *line] for line in lines]
    shown = capsys.readouterr().out
    assert "[4/4] rwkv7-tiny-" in shown
    assert shown.count("exit code 3") == 2

    runs.clear()
    assert launcher.main(["-m", "model=nano,tiny", "batch.tokens=2048,3", "trainer.devices=1"]) == 2
    assert launcher.main(["-m", "seed=1,2", "run.name=same"]) == 2
    assert runs == []
    errors = capsys.readouterr().err
    assert errors.count("batch.tokens=3 is not a multiple") == 1
    assert "run.name=same would be the directory of 2 runs" in errors


def test_multirun_expands_what_hydra_expands(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        runs.append(command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert launcher.main(["-m", "seed=range(1,4)"]) == 0
    assert launcher.main(["-m", "debug=glob(f*)"]) == 0
    assert runs == ["seed=1", "seed=2", "seed=3", "debug=fast", "debug=frequent"]


CONF = ConfFolders([resource("conf")])


def test_help_shows_everything() -> None:
    text = help_text(TRAIN, CONF)
    assert "model=       nano small [tiny] 0.1b 169m 0.4b 430m 1.5b 1b5 2.9b 3b" in text
    for group, names in CONF.groups.items():
        if group != "local":
            found = re.search(rf"^  {group}=(.*(?:\n {{8,}}\S.*)*)", text, re.MULTILINE)  # long ones are wrapped
            assert found
            assert found[1].replace("[", " ").replace("]", " ").split() == names
    settings = set(schema()) - {"arch", "strategy", "model.size", "logger"}
    shown = {line.split("=")[0].strip() for line in text.splitlines() if line.startswith("  ") and "=" in line}
    assert settings <= shown
    defaults = as_tree(launcher.load([]))
    assert f"budget.steps={defaults['budget']['steps']} " in text
    assert "batch.context=null " in text
    described = [line for line in text.splitlines() if line.startswith("  budget.hours=")]
    assert "stop after this many hours" in described[0]
    assert max(map(len, text.splitlines())) <= 110


def examples(introduction: str) -> list[list[str]]:
    lines = introduction.split("EXAMPLES\n")[1].split("\n\n")[0].splitlines()
    return [re.split(r"\s{2,}", line.strip())[0].replace("~/", "").split()[2:] for line in lines]


@pytest.mark.parametrize("argv", examples(TRAIN), ids=" ".join)
def test_the_examples_of_the_help(argv: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained(monkeypatch, lambda config, rank_info: 0)
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 0))
    save_weights(tmp_path / "model.pth", n_layer=2, n_embd=8)
    for folder in ("corpus", "books"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("a")
    (tmp_path / "notes.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert launcher.main(argv) == 0


@pytest.mark.parametrize("argv", examples(PLAN), ids=" ".join)
def test_the_examples_of_plan(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.plan(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: rwkv-train plan ")
    assert launcher.plan(argv) == 0


def best_time(
    argv: Sequence[str], folder: Path, code: int, attempts: int = 4
) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Shortest wall-clock time of a process from start to end of several attempts, since the machine may be busy."""
    times = []
    for _ in range(attempts):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *argv], cwd=folder, capture_output=True, text=True
        )
        times.append(time.perf_counter() - start)
        assert result.returncode == code, result.stderr
    return min(times), result


@pytest.mark.alone
def test_an_error_is_reported_in_time_and_nothing_is_written(tmp_path: Path) -> None:
    seconds, result = best_time(["model.n_layers=4", "batch.tokens=2000"], tmp_path, 2)
    assert seconds <= 1.5
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "error: model.n_layers=4: there is no model.n_layers\n  nearest: model.n_layer;" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.alone
def test_help_is_printed_in_time(tmp_path: Path) -> None:
    seconds, result = best_time(["--help"], tmp_path, 0)
    assert seconds <= 2
    assert result.stdout.startswith("usage: python train.py")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("override", "code"), [("model=nano", 0), ("model=70m", 2), ("logger=csv", 0)])
def test_the_check_imports_nothing_heavy(override: str, code: int) -> None:
    check = (
        "import sys; from rwkv_train.cli import launcher; code = launcher.main(sys.argv[1:]); "
        "heavy = [name for name in ('torch', 'lightning', 'deepspeed', 'matplotlib') if name in sys.modules]; "
        "sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    command = [sys.executable, "-c", check, "--cfg", override]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code, result.stderr


def test_resources_are_found() -> None:
    assert (resource("conf") / "train.yaml").is_file()
    assert (resource("cuda") / "binding.h").is_file()
