"""What the console shows during a run, and the profile of its time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from rwkv_train.cli import launcher
from rwkv_train.rundir.jsonl import JsonLines
from rwkv_train.training.callbacks.metrics import Metrics
from rwkv_train.training.callbacks.profiling import advice_on, costs_of
from rwkv_train.training.callbacks.progress import ProgressBar, span
from rwkv_train.training.finish import figures_of
from rwkv_train.training.run import train
from tests.runs import overrides_for


def progress(folder: Path, terminal: bool, quiet: bool = False) -> tuple[ProgressBar, Metrics, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=150, quiet=quiet)
    data: Any = SimpleNamespace()
    saving: Any = SimpleNamespace(every=100)
    metrics = Metrics(JsonLines(folder / "m.jsonl"), data)
    return ProgressBar(metrics, saving, 1000, console), metrics, out


def row(step: int, loss: float | None = 2.5, **more: Any) -> dict[str, Any]:
    return {"step": step, "train/loss": loss, "seconds": 0.5, "tokens_per_second": 2000.0, "mfu": 0.4, **more}


def test_a_line(tmp_path: Path) -> None:
    bar, metrics, out = progress(tmp_path, terminal=False)
    for step in range(1, 61):
        for listener in metrics.listeners:
            listener(row(step, **({"val/loss": 2.75} if step == 60 else {})))
    assert bar.text() == (
        "loss 2.5000, 2,000 tokens/s, MFU 40%, 7 min 50 s left, checkpoint in 20 s, validation 2.7500"
    )
    for listener in metrics.listeners:
        listener(row(50, None))  # rewound
    assert bar.text() == "loss not finite, validation 2.7500"
    assert out.getvalue() == ""  # nothing before fifteen seconds
    bar.on_train_end(None, None)  # type: ignore[arg-type]
    assert out.getvalue() == "step 50/1000  loss not finite, validation 2.7500\n"


def test_a_bar(tmp_path: Path) -> None:
    bar, metrics, out = progress(tmp_path, terminal=True)
    bar.on_train_start(SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
    metrics.listeners[0](row(1))
    bar.on_validation_start(None, None)  # type: ignore[arg-type]
    bar.on_train_end(None, None)  # type: ignore[arg-type]
    assert "1/1000 steps" in out.getvalue()
    assert "loss 2.5000" in out.getvalue()
    quiet, metrics, out = progress(tmp_path, terminal=True, quiet=True)
    metrics.listeners[0](row(1))
    quiet.on_train_end(None, None)  # type: ignore[arg-type]
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (3, "3 s"), (245, "4 min 5 s"), (3600, "1 h"), (25620, "7 h 7 min"), (722000, "8 d 8 h")],
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that a trace viewer reads, the ten largest costs, and no advice where nothing is certain."""
    monkeypatch.setenv("COLUMNS", "80")  # a cost has one line, whatever the operator is called
    assert train(launcher.load(overrides_for(tmp_path, "run", "budget.steps=20", "profile=true"))) == 0
    trace = json.loads((tmp_path / "runs" / "run" / "trace.json").read_text())
    names = {event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"}
    assert any(name.startswith("ProfilerStep#") for name in names)
    assert any("wkv4" in name for name in names)
    printed = capsys.readouterr().out
    table = printed[printed.index("where 10 steps went") : printed.index("trace: ")]
    lines = [line for line in table.splitlines() if line.startswith("│")]
    assert len(lines) == 10
    shares = [float(line.split("│")[3].strip().rstrip("%")) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5
    assert "to be opened in https://ui.perfetto.dev" in printed


def test_advice() -> None:
    def each(key: str, seconds: float) -> Any:
        return SimpleNamespace(key=key, self_cpu_time_total=seconds * 1e6, count=10)

    averages = [each("aten::mm", 8.0), each("aten::_local_scalar_dense", 1.0), each("ProfilerStep#3", 50.0)]
    averages.append(each("Memcpy HtoD (Pageable -> Device)", 1.0))
    costs = costs_of(averages, cuda=False)
    assert costs[0][0] == "aten::mm"
    assert len(costs) == 3
    advice = advice_on(costs, 10.0)
    assert advice == [
        "10% of the time goes into copies from pageable memory: a callback moves tensors itself; pin them",
        "10% of the time goes into .item(): a callback reads a value from the device in every step",
    ]
    assert advice_on([("aten::mm", 1.0, 1)], 1.0) == []


def test_the_figures_at_the_end() -> None:
    rows = [row(step, memory=step * 10**9, goodput=0.9, skipped=0) for step in (1, 2, 3)]
    expected = {"tokens/s": "2,000", "MFU": "40.0%", "goodput": "90.0%", "memory": "3.00 GB"}
    assert figures_of(rows) == expected
    assert figures_of([*rows, {**rows[-1], "skipped": 2}]) == {**expected, "skipped updates": "2"}
    assert figures_of([{"step": 1}]) == {}
