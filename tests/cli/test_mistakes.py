"""User errors as real commands: exit code 2, a message of one or two lines, in time, and nothing is written."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rwkv_train.cli import launcher
from rwkv_train.cli.main import main
from rwkv_train.errors import UserError
from rwkv_train.planning import resolved
from rwkv_train.rundir.directory import RunDirectory
from rwkv_train.training.run import train
from rwkv_train.training.setup import assemble
from tests import PRELOAD
from tests.runs import ROOT, losses, overrides_for, rows, start

CONFIG, TORCH, LIGHTNING = 1.5, 4.0, 10.0  # CPU seconds within which an error is reported, by what is needed to find it
# What an error of that kind is found without: the module that needs torch, or Lightning.
NOT_IMPORTED = {CONFIG: "rwkv_train.training.run", TORCH: "rwkv_train.training.loop", LIGHTNING: None}


@dataclass
class Result:
    code: int
    out: str
    err: str
    cpu: float  # user and system seconds, of the process alone: the machine may be busy with other things


def run_python(argv: Sequence[str], folder: Path) -> Result:
    """Runs `python ARGV` in a folder."""
    with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
        process = subprocess.Popen([sys.executable, *argv], cwd=folder, stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        result = Result(process.returncode, out.read(), err.read(), used.ru_utime + used.ru_stime)
    for name in ("out", "err"):
        (folder / name).unlink()
    return result


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder below a folder with the hash of its content, without .lock, which names its last owner."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a finished run of it, and files that are not what they should be."""
    folder = tmp_path_factory.mktemp("template")
    assert train(launcher.load([*overrides_for(folder, "run", "budget.steps=4", "checkpoint.every.steps=2")])) == 0
    (folder / "nothing").mkdir()
    (folder / "nothing.txt").touch()
    (folder / "short.txt").write_text("a few words")
    (folder / "picture.txt").write_bytes(b"\0\1\2" * 100)
    weights = torch.load(folder / "runs" / "run" / "weights.pth")
    torch.save({"transformer.h.0.attn.weight": torch.zeros(4, 4)}, folder / "gpt.pth")
    torch.save([weights], folder / "wrapped.pth")
    torch.save({name: value for name, value in weights.items() if "1.ffn.value" not in name}, folder / "lacks.pth")
    (folder / "torn.pth").write_bytes((folder / "runs" / "run" / "weights.pth").read_bytes()[:5000])
    checkpoint = folder / "runs" / "run" / "checkpoints" / "step_000000002-0001"
    shutil.copytree(checkpoint, folder / "torn")
    os.truncate(folder / "torn" / "state.pth", 1000)
    shutil.copytree(checkpoint, folder / "lacking")
    (folder / "lacking" / "state.pth").unlink()
    (folder / "zero.json").write_text('{"gradient_clipping": 2, "zero_optimization": {"stage": 1}}')
    return folder


NEWEST = "runs/run/checkpoints/step_000000004-0001"
GENERATE = ["-m", "rwkv_train.cli.main", "generate"]

# Arguments (added to the overrides of a tiny run of text.txt, in a copy of `template`), the time limit, and a part of
# each message.
MISTAKES: dict[str, tuple[list[str], float, list[str]]] = {
    "unknown key": (
        ["model.n_layers=4"],
        CONFIG,
        ["model.n_layers=4: there is no model.n_layers\n  nearest: model.n_layer;"],
    ),
    "wrong type": (["batch.context=long"], CONFIG, ["batch.context=long is not valid"]),
    "n_embd": (["model.n_embd=0"], CONFIG, ["model.n_embd=0 is not valid"]),
    "vocabulary": (["model.vocab_size=100"], CONFIG, ["model.vocab_size=100 is smaller than the 256 tokens"]),
    "batch": (["batch.tokens=100"], CONFIG, ["batch.tokens=100 is not a multiple of 32"]),
    "micro-batch": (["batch.micro=3"], CONFIG, ["is not a multiple of 96 (batch.context=32 × batch.micro=3)"]),
    "two budgets": (["budget.tokens=1M"], CONFIG, ["budget.steps=50 and budget.tokens=1000000 exclude each other"]),
    "three at once": (
        ["seed=x", "modle=7b", "model.n_embd=0"],
        CONFIG,
        ["seed=x is not valid", "modle=7b: there is no modle", "model.n_embd=0 is not valid"],
    ),
    "data missing": (["data.path=no/such"], CONFIG, ["data.path=no/such: there is no such file"]),
    "data empty": (["data.path=nothing.txt"], CONFIG, ["data.path=nothing.txt is an empty file"]),
    "folder empty": (["data.path=nothing"], CONFIG, ["data.path=nothing is an empty directory"]),
    "data binary": (["data.path=picture.txt"], TORCH, ["data.path=picture.txt contains no text (skipped: 1 binary"]),
    "data short": (  # on two devices: one message, and no rank waits for the other
        ["data.path=short.txt", "trainer.devices=2"],
        TORCH,
        ["has 11 tokens; one sample of batch.context=32 needs 33"],
    ),
    "precision": (["trainer.precision=16-mixed"], CONFIG, ["trainer.precision=16-mixed: float16 overflows"]),
    "devices": (["trainer.devices=900", "batch.tokens=28800"], CONFIG, ["trainer.devices=900: this machine has"]),
    "devices of any kind": (
        ["trainer.accelerator=auto", "trainer.devices=900", "batch.tokens=28800"],
        TORCH,
        ["trainer.devices=900: "],
    ),
    "a model that does not fit": (
        ["model=14b", "model.n_layer=null", "model.n_embd=null"],
        LIGHTNING,
        ["model=14b does not fit 1 × cpu with strategy="],
    ),
    "deepspeed's JSON missing": (
        ["strategy=deepspeed_2", "deepspeed=no.json"],
        CONFIG,
        ["deepspeed=no.json cannot be read: No such file"],
    ),
    "deepspeed's JSON torn": (
        ["strategy=deepspeed_2", "deepspeed=short.txt"],
        CONFIG,
        ["deepspeed=short.txt is not JSON"],
    ),
    "deepspeed's JSON against a setting": (
        ["strategy=deepspeed_2", "deepspeed=zero.json"],
        CONFIG,
        [
            "deepspeed=zero.json sets gradient_clipping, which is derived from other settings\n"
            "  remove it, and use optim.clip=",
            "deepspeed=zero.json sets zero_optimization.stage, which is derived from other settings\n"
            "  remove it, and use strategy=",
        ],
    ),
    "compile and sharded": (
        ["strategy=fsdp", "compile=true"],
        CONFIG,
        ["compile=true does not support strategy=fsdp, which shards the parameters"],
    ),
    "nodes that nothing starts": (
        ["trainer.num_nodes=2", "batch.tokens=128"],
        CONFIG,
        ["trainer.num_nodes=2, but this process was started alone: nothing starts the other nodes"],
    ),
    "device": (["device=h999"], CONFIG, ["device=h999: there is no such card\n  valid: a100-40g"]),
    "another batch": (
        ["budget.steps=4", "checkpoint.every.steps=2", "batch.tokens=256"],
        TORCH,
        ["batch.tokens: 128 → 256\n  to resume all the same: run.allow_changes=true"],
    ),
    "resume a missing shard": (
        ["resume=lacking"],
        TORCH,
        ["the checkpoint lacking is damaged: state.pth cannot be read (No such file or directory)"],
    ),
    "never": (["resume=never"], CONFIG, ["resume=never, but runs/run holds a run"]),
    "resume missing": (["resume=no/such"], CONFIG, ["resume=no/such: there is no such checkpoint"]),
    "resume a file": (["resume=gpt.pth"], CONFIG, ["resume=gpt.pth is a file, but a checkpoint is a directory"]),
    "resume a run": (["resume=runs/run"], CONFIG, [f"it has no manifest.json\n  resume={NEWEST}"]),
    "resume torn": (["resume=torn"], TORCH, ["the checkpoint torn is damaged: state.pth has 1000 bytes"]),
    "resume another shape": (
        ["model.n_embd=48", f"resume={NEWEST}"],
        TORCH,
        [f"the checkpoint {NEWEST} does not fit the model: emb.weight has shape (256, 32), this model (256, 48)"],
    ),
    "another config": (
        ["optim.clip=0.5"],
        TORCH,
        ["budget.steps: 4 → 50; optim.clip: 1.0 → 0.5"],
    ),
    "an unknown metric": (
        [
            "+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping",
            "+callbacks.stop.monitor=val/los",
        ],
        CONFIG,
        ["callbacks.stop.monitor=val/los: there is no such metric\n  nearest: val/loss; valid: val/loss"],
    ),
    "a health policy": (["health.nonfinite=ignore"], CONFIG, ["health.nonfinite=ignore is not valid"]),
    "a logger's argument": (
        ["logger=wandb", "+logger.wandb.projekt=x", "run.name=new"],
        TORCH,
        ["logger.wandb: rwkv_train.trackers.wandb.Wandb got an unexpected keyword argument 'projekt'"],
    ),
    "replay of nothing": (["replay=no.json"], CONFIG, ["replay=no.json cannot be read: No such file or directory"]),
    "replay of something else": (
        ["replay=zero.json"],
        CONFIG,
        ["replay=zero.json cannot be read: it is not a replay file"],
    ),
    "weights missing": (["init.weights=no.pth"], CONFIG, ["init.weights=no.pth: there is no such file"]),
    "weights torn": (["init.weights=torn.pth"], CONFIG, ["torn.pth cannot be read as weights: it is cut short"]),
    "weights of another architecture": (
        ["init.weights=gpt.pth"],
        CONFIG,
        ["gpt.pth does not hold the weights of a language model under the field's names (it holds transformer.h.0"],
    ),
    "weights of another shape": (
        ["init.weights=runs/run/weights.pth", "model.n_embd=48"],
        CONFIG,
        ["model.n_embd=48, but init.weights=runs/run/weights.pth has 32"],
    ),
    "weights that lack one": (["init.weights=lacks.pth"], TORCH, ["blocks.1.ffn.value.weight is missing"]),
    "generate from nothing": ([*GENERATE, "no.pth"], TORCH, ["there is no file no.pth"]),
    "generate from torn weights": (
        [*GENERATE, "torn.pth"],
        TORCH,
        ["torn.pth cannot be read as weights: it is cut short"],
    ),
    "generate from another architecture": (
        [*GENERATE, "gpt.pth"],
        TORCH,
        ["gpt.pth does not hold the weights of a language model under the field's names (it holds transformer.h.0"],
    ),
    "generate from a list": (
        [*GENERATE, "wrapped.pth"],
        TORCH,
        ["wrapped.pth does not hold a dict of tensors"],
    ),
    "generate from weights that lack one": ([*GENERATE, "lacks.pth"], TORCH, ["blocks.1.ffn.value.weight is missing"]),
    "generate out of range": ([*GENERATE, "no.pth", "--top-p", "2"], TORCH, ["--top-p 2.0 is out of range"]),
}


IN_TIME = ["three at once", "data short", "a model that does not fit", "generate from torn weights"]


def command(mistake: str, template: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of the template, and the command line to run in it."""
    arguments, folder = MISTAKES[mistake][0], tmp_path / "here"
    shutil.copytree(template, folder)
    if arguments[0] == "-m":
        return folder, arguments
    tiny = overrides_for(folder, "run", "data.path=text.txt", "run.root=runs", *arguments)
    if "data=text" in tiny and any(argument.startswith("init.weights") for argument in arguments):
        tiny = [argument for argument in tiny if argument in arguments or not argument.startswith("model.")]
    return folder, [str(ROOT / "train.py"), *tiny]


def check_report(result: Result, expected: Sequence[str]) -> None:
    assert (result.code, result.out) == (2, "")
    for part in expected:
        assert part in result.err
    assert result.err.count("error: ") == len(expected)
    assert len(result.err.splitlines()) <= 2 * len(expected)
    assert "Traceback" not in result.err


def run_forked(argv: Sequence[str], folder: Path, without: str | None) -> Result:
    """As `run_python`, without the seconds that imports take: in a process that is forked from one that has them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_forked, args=(list(argv), folder, without))
    process.start()
    process.join()
    assert process.exitcode is not None
    result = Result(process.exitcode, (folder / "out").read_text(), (folder / "err").read_text(), 0.0)
    for name in ("out", "err"):
        (folder / name).unlink()
    return result


def _forked(argv: list[str], folder: Path, without: str | None) -> None:
    os.chdir(folder)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    if without is not None:
        sys.modules[without] = None  # type: ignore[assignment]  # whoever imports it gets an ImportError
        for name in [name for name in sys.modules if name.startswith("rwkv_train.cli.")]:
            if name not in (launcher.__name__, main.__module__):
                del sys.modules[name]  # they were imported before the fork, when they could have imported it
    sys.exit(main(argv[2:]) if argv[0] == "-m" else launcher.main(argv[1:]))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(mistake: str, template: Path, tmp_path: Path) -> None:
    _, needs, expected = MISTAKES[mistake]
    folder, argv = command(mistake, template, tmp_path)
    before = snapshot(folder)
    check_report(run_forked(argv, folder, NOT_IMPORTED[needs]), expected)
    assert snapshot(folder) == before


@pytest.mark.alone
@pytest.mark.parametrize("mistake", IN_TIME)
def test_a_mistake_is_reported_in_time(mistake: str, template: Path, tmp_path: Path) -> None:
    """As a real command, at least one for each kind of what is needed to find it."""
    _, seconds, expected = MISTAKES[mistake]
    folder, argv = command(mistake, template, tmp_path)
    result = run_python(argv, folder)
    check_report(result, expected)
    if result.cpu > seconds:  # cold caches of a busy machine; twice in a row, it is the program
        result = run_python(argv, folder)
    assert result.cpu <= seconds


def test_a_device_without_the_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An old GPU, and too few of them; simulated."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GeForce GTX 1080")
    overrides = overrides_for(tmp_path, "run", "trainer.accelerator=gpu")
    with pytest.raises(UserError, match=r"trainer\.precision=bf16-mixed: GeForce GTX 1080 has no bfloat16"):
        assemble(launcher.load([*overrides, "trainer.precision=bf16-mixed"]))
    monkeypatch.setattr(resolved, "present_card", lambda: None)
    assert assemble(launcher.load(overrides)).resolved.precision == "32-true"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert assemble(launcher.load(overrides)).resolved.precision == "bf16-mixed"
    with pytest.raises(UserError, match=r"trainer\.devices=2: torch can use 1 GPUs here\n  trainer\.devices=1"):
        assemble(launcher.load([*overrides[:-1], "trainer.accelerator=gpu", "trainer.devices=2"]))


def test_a_strategy_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"strategy=deepspeed_2 needs deepspeed, which is not installed\n  pip install"):
        assemble(launcher.load(overrides_for(tmp_path, "run", "strategy=deepspeed_2")))


@contextmanager
def running(overrides: Sequence[str], begun: Callable[[], bool]) -> Iterator[subprocess.Popen[str]]:
    """`python train.py OVERRIDES` from the moment when it has begun; it is killed at the end of the block."""
    with start(overrides) as process:
        try:
            while not begun():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


@pytest.mark.alone
def test_a_directory_in_use(tmp_path: Path) -> None:
    overrides = overrides_for(tmp_path, "run")
    run = tmp_path / "runs" / "run"
    with RunDirectory(str(tmp_path / "runs"), "run").claimed(first=True):
        before = snapshot(tmp_path)
        result = run_python([str(ROOT / "train.py"), *overrides], tmp_path)
        assert snapshot(tmp_path) == before
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(
        rf"error: the run directory {run} is in use by another process \(pid {os.getpid()} on .+\)\n"
        r"  wait for it, stop it, or give this run another name: run\.name=NAME\n",
        result.err,
    )
    assert result.cpu <= LIGHTNING


def test_interrupted_then_resumed(tmp_path: Path) -> None:
    """Ctrl-C ends a run with one line; the same command resumes it."""
    overrides = overrides_for(
        tmp_path, "run", "budget.steps=1000000", "checkpoint.every.steps=20", "validation.every.steps=5000"
    )
    run = tmp_path / "runs" / "run"
    with running(overrides, lambda: any(run.glob("checkpoints/step_*"))) as process:
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 75
    assert "Traceback" not in printed
    step = len(losses(run))
    last = re.search(r"\nSIGINT at step (\d+); the same command resumes from the checkpoint of step (\d+)\n$", printed)
    assert last is not None, printed
    assert int(last[1]) == int(last[2]) == step

    with running(
        overrides, lambda: len(run.joinpath("metrics.jsonl").read_bytes().splitlines()) > step + 20
    ) as process:
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 75
    assert f"resumed from {run}/checkpoints/step_{step:09d}-0001" in printed
    assert len(losses(run)) > step
    happened = [row["event"] for row in rows(run, "events.jsonl") if row["event"] != "checkpoint"]
    assert happened == ["started", "interrupted", "resumed", "interrupted"]
