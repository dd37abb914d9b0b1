"""The report's data: nothing that was logged is lost, whatever the state of the run directory."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_train.cli import launcher
from rwkv_train.cli import main as cli
from rwkv_train.errors import UserError
from rwkv_train.evaluation.report import figures, live_server, page, report_command
from rwkv_train.evaluation.report.charts import CHARTS, charts
from rwkv_train.evaluation.report.live_server import ReportServer
from rwkv_train.evaluation.report.metrics_table import MetricColumn, MetricsTable, extremes, trend
from rwkv_train.evaluation.report.page import payload, render
from rwkv_train.evaluation.report.recorded_run import RecordedRun, open_runs
from tests.evaluation.made_runs import make_run


@pytest.fixture(autouse=True)
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report needs none, and the threads of none are prepared for."""
    monkeypatch.setattr(launcher, "share_cores", lambda: None)


def append(path: Path, *lines: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)


def test_columns_are_what_was_written(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, 3001):
        row: dict[str, Any] = {"step": step, "lr": draw.random(), "n": step % 7, "text": "no number"}
        if step % 100 == 0:
            row |= {"val/loss": draw.random(), "layers/x": [draw.random(), None, 3]}
        rows.append(row)
    append(tmp_path / "metrics.jsonl", *(json.dumps(row) + "\n" for row in rows))
    metrics = MetricsTable(tmp_path / "metrics.jsonl")
    assert metrics.refresh()
    assert not metrics.refresh()
    assert set(metrics.columns) == {"lr", "n", "val/loss", "layers/x"}
    for key in ("lr", "n", "val/loss"):
        wanted = [(row["step"], row[key]) for row in rows if key in row]
        column = metrics.columns[key]
        assert list(zip(column.steps.tolist(), column.values.tolist(), strict=True)) == wanted
    layers = metrics.columns["layers/x"]
    assert layers.values.shape == (30, 3)
    assert np.isnan(layers.values[:, 1]).all()


def test_missing_and_non_finite_values_are_gaps(tmp_path: Path) -> None:
    lines = ['{"step": 1, "a": NaN, "b": 1}\n', '{"step": 2, "a": 2.5, "b": -Infinity}\n', '{"step": 3, "a": null}\n']
    append(tmp_path / "metrics.jsonl", *lines)
    metrics = MetricsTable(tmp_path / "metrics.jsonl")
    metrics.refresh()
    assert [metrics.columns[key].steps.tolist() for key in "ab"] == [[2], [1]]


def test_half_written_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, '{"step": 1, "a": 1}\n', '{"step": 2, "a"', ': 2}\nnonsense\n[1]\n{"a": 3}\n', '{"step": 3, "a": 3.5')
    metrics = MetricsTable(path)
    metrics.refresh()
    assert metrics.columns["a"].values.tolist() == [1, 2]
    assert metrics.unreadable == 3
    append(path, "}\n")  # what was being written then
    assert metrics.refresh()
    assert metrics.columns["a"].values.tolist() == [1, 2, 3.5]


def test_a_truncated_or_replaced_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, *(f'{{"step": {step}, "a": {step}}}\n' for step in range(1, 6)))
    metrics = MetricsTable(path)
    metrics.refresh()
    path.write_text('{"step": 1, "a": 7}\n')
    assert metrics.refresh()
    assert metrics.columns["a"].values.tolist() == [7]
    append(path, '{"step": 1, "a": 8}\n')  # a step that is there twice: the later row counts
    metrics.refresh()
    assert metrics.columns["a"].values.tolist() == [8]
    other = tmp_path / "other"
    other.write_text('{"step": 1, "a": 9}\n{"step": 2, "a": 9}\n')
    other.replace(path)
    metrics.refresh()
    assert metrics.columns["a"].steps.tolist() == [1, 2]
    path.unlink()
    assert metrics.refresh()
    assert metrics.columns == {}


@pytest.mark.parametrize("count", [1, 2, 10, 999, 1000, 100_003])
def test_spikes_survive(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    spikes = np.random.default_rng(1).integers(0, count, 3)
    values[spikes] = [1e3, -1e3, 500][: len(spikes)]
    column = MetricColumn(np.arange(1, count + 1) * 3, values)
    thin = extremes(column, 100)
    assert len(thin.steps) <= 202
    assert (np.diff(thin.steps) > 0).all()
    assert set(zip(thin.steps.tolist(), thin.values.tolist(), strict=True)) <= set(
        zip(column.steps.tolist(), values.tolist(), strict=True)
    )
    assert (thin.steps[0], thin.steps[-1]) == (3, 3 * count)
    for spike in spikes:
        assert 3 * (spike + 1) in thin.steps or (count > 300 and abs(values[spike]) == 500)
    assert thin.values.max() == values.max()
    assert thin.values.min() == values.min()


def test_the_trend_is_a_centred_mean() -> None:
    steps = np.arange(1, 2001)
    line = trend(MetricColumn(steps, (5.0 - 0.001 * steps).astype(np.float64)))
    assert line is not None
    inside = (line.steps > 20) & (line.steps < 1980)
    assert line.values[inside] == pytest.approx(5.0 - 0.001 * line.steps[inside])
    assert trend(MetricColumn(steps[:200], steps[:200].astype(np.float64))) is None
    noisy = trend(MetricColumn(steps, np.random.default_rng(0).normal(size=2000)))
    assert noisy is not None
    assert np.abs(noisy.values).max() < 1.5


def test_known_metrics_are_grouped_and_others_have_charts_too() -> None:
    keys = [key for chart in CHARTS for key in chart.lines]
    assert len(keys) == len(set(keys))
    shown = charts([*keys, "tokens", "time", "hours", "val/loss/books", "tokens/books", "my/own"])
    assert [chart.section for chart in shown] == sorted(
        (chart.section for chart in shown),
        key=["Loss", "Optimisation", "Speed", "Health", "Loss by source", "Other"].index,
    )
    assert {key for chart in shown for key in chart.lines} == {*keys, "val/loss/books", "tokens/books", "my/own"}
    assert shown[-1].title == "my/own"


def test_the_payload(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", steps=500, lr=1e-3)
    other = make_run(tmp_path / "two", steps=300, lr=2e-3, seed=5)
    data = payload(open_runs([run, other]))
    json.dumps(data, allow_nan=False)
    assert [found["name"] for found in data["runs"]] == ["one", "two"]
    assert {row["setting"]: row["values"] for row in data["differences"]} == {
        "optim.lr": ["0.001", "0.002"],
        "seed": ["0", "5"],
    }
    first = data["runs"][0]
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = first["curves"]["train/loss"]
    assert np.cumsum(losses["x"]).tolist() == [row["step"] for row in written]
    assert losses["y"] == pytest.approx([row["train/loss"] for row in written], rel=1e-4)
    assert first["clock"]["tokens"]["y"][-1] == 500 * 1024
    assert first["clock"]["hours"]["y"][-1] == pytest.approx(written[-1]["hours"])
    assert [event["event"] for event in first["events"]][:2] == ["started", "checkpoint"]
    assert first["samples"][1] == {"step": 500, "text": "def main(argv):\n    return </script><b>"}
    assert first["evaluations"]["eval.json"]["all"]["bits_per_byte"] == 1.78
    decay = first["layers"]["decay/half_life"]
    assert np.array(decay["y"]).shape == (len(decay["x"]), 4, 5)
    assert {layer["key"] for layer in data["layers"]} == {
        *(f"layers/{name}" for name in ("grad_norm", "update_ratio", "state_rms", "receptance_saturated")),
        *("layers/contribution", "layers/own"),
    }
    summary = first["summary"]
    assert (summary["step"], summary["tokens"], summary["state"]) == (500, 512_000, "finished")
    assert summary["best_val_loss"] <= summary["val_loss"]


def test_many_runs_share_the_points_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = open_runs([make_run(tmp_path / f"run_{number}", steps=2000, seed=number) for number in range(2)])
    one = payload(runs[:1])["runs"][0]["curves"]
    monkeypatch.setattr(page, "_MAX_POINTS", page._MAX_POINTS // 20)  # as if there were twenty times the runs
    two = payload(runs)["runs"][0]["curves"]
    assert len(one["train/loss"]["x"]) == 2000
    assert len(two["train/loss"]["x"]) < 300


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a<b>&{{data}}", steps=50)
    assert cli.main(["report", str(run)]) == 0
    html = (run / "report.html").read_text()
    assert "connect-src 'none'" in html
    assert not re.search(r"(?:src|href)=|url\(|@import", html.replace("u.src=", ""))
    assert "<title>a&lt;b&gt;&amp;{{data}}" in html
    held = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    assert held
    assert json.loads(held[1])["runs"][0]["name"] == "a<b>&{{data}}"
    assert html.count("</script>") == 3, "nothing in the data ends a script"
    assert "connect-src 'self'" in render(payload([RecordedRun(run)]), live=True)


def test_where_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(tmp_path / name, steps=60)) for name in ("one", "two")]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *runs]) == 0
    assert re.match(r"wrote report\.html \(\d\.\d MB\)\n", capsys.readouterr().out)
    assert cli.main(["report", *runs, "--out", "x.html"]) == 0
    assert Path("x.html").exists()
    assert cli.main(["report", *runs, "--out", "no/where.html"]) == 2
    assert "cannot be written: No such file or directory\n  give another path with --out" in capsys.readouterr().err


DRAWN_METRICS = ("step", "train/loss", "val/loss", "grad_norm", "time/data", "time/forward", "decay/half_life")


def test_charts_as_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few of the metrics: a picture of every chart there is takes seconds."""
    runs = [make_run(tmp_path / name, steps=400, seed=seed) for seed, name in enumerate(("one", "two"))]
    for run in runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [{key: row[key] for key in DRAWN_METRICS if key in row} for row in rows]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    for paths, expected in (
        (runs[:1], {"loss", "gradient_norm", "where_a_step_s_time_goes", "time_decay"}),
        (
            runs,
            {"loss", "gradient_norm", "one_time_decay", "two_time_decay"}
            | {f"where_a_step_s_time_goes_{part}" for part in ("data", "forward")},
        ),
    ):
        folder = tmp_path / f"pictures{len(paths)}"
        out = ["--out", str(tmp_path / "x.html"), "--png", str(folder)]
        assert cli.main(["report", *map(str, paths), *out]) == 0
        assert {path.stem for path in folder.iterdir()} == expected
        assert all(path.read_bytes()[:4] == b"\x89PNG" for path in folder.iterdir())
        assert f"wrote {folder}/loss.png" in capsys.readouterr().out


def loss_axes(rows: list[dict[str, Any]], baselines: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The axes that draw_loss_curve fills; None if it draws nothing."""
    from matplotlib.figure import Figure

    drawn: list[Any] = []

    def save(path: Path, inches: tuple[float, float], dpi: int, fill: Any) -> None:
        drawn.append(Figure(figsize=inches).add_subplot())
        fill(drawn[-1])

    monkeypatch.setattr(figures, "_save", save)
    figures.draw_loss_curve(rows, Path("loss.png"), "a run", baselines)
    return drawn[0] if drawn else None


def test_the_loss_curve_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"step": step, "train/loss": 2 + 4 / step} for step in range(1, 401)]
    rows[99]["train/loss"] = None  # a bad step
    rows[399]["val/loss"] = 2.5
    figures.draw_loss_curve(rows, tmp_path / "loss", "a run", {})
    assert (tmp_path / "loss").read_bytes()[:4] == b"\x89PNG", "whatever the suffix: a run writes a temporary file"
    baselines = {"2-gram": 1.9, "lzma": 1.91, "far above": 99.0}
    axes = loss_axes(rows, baselines, monkeypatch)
    assert axes.get_title() == "a run"
    assert axes.get_ylabel() == "Loss (nats/token)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]
    thin, trend_line, validation, *horizontal = axes.lines
    assert 100 not in thin.get_xdata()
    assert len(trend_line.get_xdata()) < len(thin.get_xdata()) == 399
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([400], [2.5])
    assert sorted(line.get_ydata()[0] for line in horizontal) == [1.9, 1.91]
    assert [text.get_text() for text in axes.texts] == [" 2-gram 1.90", " lzma 1.91"]
    first, second = (text.xy[1] for text in axes.texts)
    bottom, top = axes.get_ylim()
    assert second - first >= 0.034 * (top - bottom), "labels do not overlap"
    assert bottom < 1.9 < 2.5 < top


def test_a_run_without_a_finite_loss_has_no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loss_axes([{"step": 1, "train/loss": None}], {}, monkeypatch) is None
    assert loss_axes([], {}, monkeypatch) is None


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        report_command.run(report_command.ReportOptions([str(path)]))
    return str(error.value)


def test_error_messages_and_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "one", steps=5)
    make_run(tmp_path / "runs" / "two", steps=5)
    assert refused(tmp_path / "runs" / "tow") == f"there is no directory {tmp_path}/runs/tow\n  runs there: one, two"
    assert refused(tmp_path / "runs" / "one" / "config.yaml").startswith(f"{tmp_path}/runs/one/config.yaml is a file\n")
    assert refused(tmp_path / "runs") == (
        f"{tmp_path}/runs is not a run's directory, it contains 2: one, two\n  give {tmp_path}/runs/*"
    )
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty") == (
        f"{tmp_path}/empty has no metrics.jsonl\n  give a run's directory: runs/NAME"
    )
    (tmp_path / "empty" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "train/lo')
    assert refused(tmp_path / "empty") == (
        f"{tmp_path}/empty has logged no step yet\n  wait for the first one with `report --live`"
    )
    run = make_run(tmp_path / "half", steps=5)
    append(run / "metrics.jsonl", "torn\n", '{"step": 6, "trai')
    append(run / "events.jsonl", "torn\n")
    (run / "config.yaml").write_text("a: [")
    (run / "eval.json").write_text("{")
    assert cli.main(["report", str(run)]) == 0
    output = capsys.readouterr().out
    assert "note: half: metrics.jsonl: left out 1 lines that are not rows" in output
    assert "note: half: events.jsonl: left out 1 lines that are not events" in output
    assert "note: half: config.yaml cannot be read: while parsing" in output
    assert "note: half: eval.json cannot be read: Expecting" in output


def test_two_runs_of_one_name_are_distinguished(tmp_path: Path) -> None:
    runs = open_runs([make_run(tmp_path / place / "run", steps=5) for place in ("here", "there")])
    assert [run.name for run in runs] == ["here/run", "there/run"]


@contextmanager
def served(run: Path) -> Iterator[ReportServer]:
    with ReportServer(open_runs([run], wait=True), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_a_live_report_is_for_who_has_its_address(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with served(tmp_path / "run") as server:
        port = f"http://127.0.0.1:{server.server_port}"
        assert len(server.address.removeprefix(port)) == 24
        for path in ("/", "/data.json", f"/{'a' * 22}/", f"/{'a' * 22}/data.json", "/ä"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(port + urllib.parse.quote(path))


def test_connections_of_a_live_report_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_server, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(live_server._Handler, "timeout", 0.5)
    (tmp_path / "run").mkdir()
    with served(tmp_path / "run") as server:
        address = ("127.0.0.1", server.server_port)
        idle = [socket.create_connection(address, timeout=5) for _ in range(2)]
        with socket.create_connection(address, timeout=0.3) as one_more:
            assert one_more.recv(1) == b"", "it is refused at once"
        for connection in idle:
            with connection:
                assert connection.recv(1) == b"", "a connection that asks nothing is closed"
        assert urllib.request.urlopen(server.address).status == 200


def test_a_live_report_follows(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with ReportServer(open_runs([run], wait=True), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            with urllib.request.urlopen(server.address) as answer:
                assert 'data-live="true"' in answer.read().decode()
            with urllib.request.urlopen(f"{server.address}data.json") as answer:
                tag = answer.headers["ETag"]
                assert json.load(answer)["runs"][0]["curves"] == {}
            again = urllib.request.Request(f"{server.address}data.json", headers={"If-None-Match": tag})
            with pytest.raises(urllib.error.HTTPError, match="304"):
                urllib.request.urlopen(again)
            append(run / "metrics.jsonl", '{"step": 1, "train/loss": 5.5}\n', '{"step": 2, "train/loss": 5.')
            with urllib.request.urlopen(again) as answer:
                assert json.load(answer)["runs"][0]["curves"]["train/loss"]["y"] == [5.5]
            for path, host, code in (("nothing", "127.0.0.1", 404), ("data.json", "evil.example", 403)):
                asked = urllib.request.Request(f"{server.address}{path}", headers={"Host": host})
                with pytest.raises(urllib.error.HTTPError, match=str(code)):
                    urllib.request.urlopen(asked)
            with pytest.raises(UserError, match=f"--port {server.server_port} cannot be used: Address already in use"):
                ReportServer([], server.server_port)
        finally:
            server.shutdown()
            thread.join()
