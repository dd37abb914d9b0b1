"""Reports in a real Chromium: curves are drawn, controls work, the page fits a phone, and nothing is fetched."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

from rwkv_train.evaluation.report.live_server import ReportServer
from rwkv_train.evaluation.report.page import payload, render
from rwkv_train.evaluation.report.recorded_run import open_runs
from tests.evaluation.made_runs import make_run

INSTALLED = ("chromium-headless-shell", "chromium", "google-chrome")
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, INSTALLED)), None)
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.fail(f"no Chromium to open reports in: `make browser` installs one ({error})")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run's report, and one that compares two."""
    folder = tmp_path_factory.mktemp("reports")
    runs = [make_run(folder / name, 600, seed, 1e-3 * (seed + 1)) for seed, name in enumerate(("one", "two"))]
    found = {}
    for name, paths in (("single", runs[:1]), ("both", runs)):
        found[name] = folder / f"{name}.html"
        found[name].write_text(render(payload(open_runs(paths))))
    return found


@pytest.fixture
def opened(browser: Browser, reports: dict[str, Path]) -> Iterator[Any]:
    """`opened("single", **options)`: the page of a report; what it asked for or complained of fails the test."""
    contexts, asked, complaints = [], [], []

    def open_page(name: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(reports[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert asked == [reports[Path(url).stem].as_uri() for url in asked], "it asked for nothing but itself"


def chart(page: Page, name: str) -> Any:
    """A card's element, drawn."""
    card = page.locator(f'[data-chart="{name}"]')
    card.scroll_into_view_if_needed()
    card.locator("canvas").wait_for()
    return card


PIXELS = """
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const { width, height } = canvas, { data } = copy.getImageData(0, 0, width, height);
"""
COLOURED = (
    f"canvas => {{ {PIXELS}"
    + """
  const seen = new Map();
  for (let i = 0; i < data.length; i += 4) {
    const [r, g, b, a] = data.slice(i, i + 4);
    if (a > 200 && Math.max(r, g, b) - Math.min(r, g, b) > 60) {
      const key = [r, g, b].join(" ");
      seen.set(key, (seen.get(key) || 0) + 1);
    }
  }
  return Object.fromEntries([...seen].filter(([, count]) => count > 20));
}"""
)


def colours(card: Any) -> set[str]:
    """Of the curves: what is not grey and covers more than a few pixels."""
    return set(card.locator("canvas").evaluate(COLOURED))


def test_curves_are_drawn(opened: Any) -> None:
    page = opened("single")
    names = page.locator("[data-chart]").evaluate_all("cards => cards.map(card => card.dataset.chart)")
    assert {
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "decay/half_life",
        "layers/own",
        "by_position",
    } <= set(names)
    assert len(names) >= 20
    for name in names:
        assert colours(chart(page, name)), f"{name} has no curve"
    loss = chart(page, "Loss")
    assert {"15 98 174", "200 80 10"} <= colours(loss), "training and validation"
    assert loss.locator(".key").inner_text().split() == ["——", "training", "——", "validation"]
    assert page.locator("h1").inner_text() == "one"


def test_the_spike_is_there_and_marked(opened: Any) -> None:
    """The one step that is five nats above the others, and the event beside it."""
    page = opened("single")
    marks = [tuple(map(int, found.split())) for found in colours(chart(page, "Loss"))]
    assert any(red > 180 and green < 110 and blue < 110 for red, green, blue in marks), "the event's red"
    page.select_option("#curves", "all")
    page.uncheck("#events")
    highest = (
        chart(page, "Loss")
        .locator("canvas")
        .evaluate(
            f"canvas => {{ {PIXELS}"
            """
          const top = x => { for (let y = 0; y < height; y++) {
            const i = 4 * (y * width + x);
            if (data[i + 3] > 60 && data[i + 2] - data[i] > 40) return y;
          } return height; };
          const tops = [...Array(width).keys()].map(top), best = Math.min(...tops);
          return tops.indexOf(best) / width;
        }"""
        )
    )
    assert 0.4 < highest < 0.65


def axis_values(card: Any) -> str:
    """What is written along a chart is in its canvas; the picture changes with it."""
    return str(card.locator("canvas").evaluate("canvas => canvas.toDataURL()"))


@pytest.mark.parametrize(
    ("control", "values"),
    [("axis", ["tokens", "hours"]), ("scale", ["log"]), ("curves", ["trend", "all"]), ("theme", ["dark"])],
)
def test_controls_change_the_charts(opened: Any, control: str, values: list[str]) -> None:
    page = opened("single")
    seen = {axis_values(chart(page, "Loss"))}
    for value in values:
        page.select_option(f"#{control}", value)
        seen.add(axis_values(chart(page, "Loss")))
    assert len(seen) == 1 + len(values)


def test_events_can_be_hidden(opened: Any) -> None:
    page = opened("single")
    before = axis_values(chart(page, "Goodput"))
    page.uncheck("#events")
    assert axis_values(chart(page, "Goodput")) != before
    assert page.locator("text=loss_spike").count() == 1, "the list of them stays"


def test_the_cursor_shows_values_and_dragging_zooms(opened: Any) -> None:
    page = opened("single")
    loss = chart(page, "Loss")
    over = loss.locator(".u-over").bounding_box()
    page.mouse.move(over["x"] + over["width"] / 2, over["y"] + over["height"] / 2)
    values = loss.locator(".read").inner_text()
    assert re.match(r"30\d optimiser steps +● training \d\.\d+ +● validation \d\.\d+ +▏loss_spike, step 300", values), (
        values
    )
    before = axis_values(loss)
    page.mouse.down()
    page.mouse.move(over["x"] + over["width"] * 0.75, over["y"] + over["height"] / 2, steps=4)
    page.mouse.up()
    assert axis_values(loss) != before


def test_the_spectrum_moves_through_time(opened: Any) -> None:
    page = opened("single")
    card = chart(page, "decay/half_life")
    assert card.locator("output").inner_text() == "step 600"
    last = axis_values(card)
    card.locator("input[type=range]").fill("0")
    assert card.locator("output").inner_text() == "step 60"
    assert axis_values(card) != last


def test_runs_are_compared(opened: Any) -> None:
    page = opened("both")
    assert page.locator("table").first.locator("tbody tr").count() == 2
    settings = page.locator("details table").inner_text().split()
    assert settings == ["setting", "one", "two", "seed", "0", "1", "optim.lr", "0.001", "0.002"]
    both = colours(chart(page, "Throughput"))
    assert {"15 98 174", "200 80 10"} <= both
    page.get_by_role("button", name="two").click()
    assert page.get_by_role("button", name="two").get_attribute("aria-pressed") == "false"
    assert "200 80 10" not in colours(chart(page, "Throughput"))
    page.locator("select.focus").first.select_option("1")
    assert page.locator(".sample").inner_text() == "def main(argv):\n    return </script><b>"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["single", "both"])
def test_a_phone(opened: Any, scheme: str, name: str) -> None:
    """Nothing is wider than the screen, letters are not tiny, and ink is far from paper."""
    page = opened(name, color_scheme=scheme, **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert chart(page, "Loss").bounding_box()["width"] > 340
    assert colours(chart(page, "Loss"))
    contrasts = page.evaluate(
        """() => {
          const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
          const light = text => {
            const [r, g, b] = text.match(/\\d+/g).map(n => linear(n / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const paper = light(getComputedStyle(document.body).backgroundColor);
          return ["body", "#about"].map(name => light(getComputedStyle(document.querySelector(name)).color))
            .map(ink => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05));
        }"""
    )
    assert contrasts[0] > 12
    assert contrasts[1] > 4.5, "soft ink too"
    sizes = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
          .filter(e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
          .map(e => parseFloat(getComputedStyle(e).fontSize))"""
    )
    assert min(sizes) >= 11.5
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(19, 20, 23)") == (scheme == "dark")


def test_a_live_page_shows_new_steps(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 50)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:20]))
    with ReportServer(open_runs([run]), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        page = browser.new_page()
        try:
            page.goto(server.address)
            assert page.locator("#about").inner_text() == "up to step 20, live"
            page.select_option("#axis", "tokens")
            with open(run / "metrics.jsonl", "a") as file:
                file.writelines(rows[20:])
            page.locator("#about", has_text="up to step 50, live").wait_for(timeout=60_000)
            assert page.input_value("#axis") == "tokens", "what was chosen stays"
            assert colours(chart(page, "Loss"))
        finally:
            page.close()
            server.shutdown()
            thread.join()


NASTY = (
    "".join(map(chr, range(1, 256)))
    + "</script><img src=x onerror=fail()></SCRIPT <!-- --> <script> ]]> &lt; {{data}}"
    "\u2028\u2029\ufeff\ufffe\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")
)
HALF = "\ud800 and \udfff"  # written as an escape; shown as two replacement characters
SHOWN = NASTY + "� and �"


def nasty_run(path: Path, seed: int) -> Path:
    """A run whose every text is NASTY + HALF, with rows, events and evaluations that are none among the good ones."""
    run = make_run(path, 20, seed)
    (run / "samples.txt").write_bytes(b"===== after 20 steps =====\n" + NASTY.encode() + b"\0\xff\n")
    (run / "config.yaml").write_text(json.dumps({"a": f"{seed}{NASTY}", "when": {NASTY[:20]: seed}}))
    rows = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    rows[3] = (
        json.dumps({"step": 4, "__proto__": 1.5, "constructor": 2.5, NASTY: 3.5, "train/loss": 2}).encode() + b"\n"
    )
    rows[5:6] = [b"[" * 50_000 + b"\n", b"\0" * 100 + b"\n", b'{"step": 6, "train/loss": NaN, "own": Infinity}\n']
    (run / "metrics.jsonl").write_bytes(b"".join(rows))
    events: list[Any] = [
        {"time": 1.7e9, "event": NASTY + HALF, "step": 4, "reason": NASTY + HALF, NASTY: {"deep": NASTY}},
        {"time": "yesterday", "event": "left out", "step": 5},
        {"time": 1e200, "event": "late", "step": 6, "z": float("nan")},
        {"time": 1.7e9, "event": "left out", "step": [5]},
        [],
        {"time": 1.7e9, "event": "finished", "step": 20, "rest": 10**400},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    source = {"name": NASTY + HALF, "tokens": float("nan"), "nats_per_token": 1.5, "by_position": []}
    found = {"step": 20, "sources": [source, source], "all": source, "tasks": {NASTY: {HALF: 0.25, "text": NASTY}}}
    (run / "eval.json").write_text(json.dumps(found))
    (run / "eval-null.json").write_text('{"tasks": {"a": null}}')
    (run / "eval-text.json").write_text('{"sources": [{"name": "a", "tokens": "many"}]}')
    (run / "eval-deep.json").write_text("[" * 100_000)
    return run


def test_every_text_is_shown_as_it_is(browser: Browser, tmp_path: Path) -> None:
    """Whatever a document, a setting, an event or an evaluation holds; what is damaged costs only itself."""
    names = ("<!--<script>&amp;", "b")
    runs = open_runs([nasty_run(tmp_path / name, seed) for seed, name in enumerate(names)])
    (tmp_path / "report.html").write_text(render(payload(runs)), encoding="utf-8")
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator(".sample").evaluate("pre => pre.textContent") == NASTY + "\0�"
    cells = page.locator("td").evaluate_all("cells => cells.map(cell => cell.textContent)")
    for text in (f"0{NASTY}", f"1{NASTY}", SHOWN, NASTY, "� and �", "late", "finished", names[0]):
        assert any(text in cell for cell in cells), text
    assert "left out" not in cells
    assert any(f"reason: {SHOWN}" in cell for cell in cells)
    shown = page.locator("[data-chart]").evaluate_all("cards => cards.map(card => card.dataset.chart)")
    assert {"Loss", "__proto__", "constructor", NASTY} <= set(shown)
    assert colours(chart(page, "Loss"))
    notes = page.locator(".note").all_inner_texts()
    for note in (
        "metrics.jsonl: left out 2 lines that are not rows",
        "events.jsonl: left out 3 lines that are not events",
        "eval-null.json cannot be read: tasks.a is not an object",
        "eval-text.json cannot be read: tokens is not a number",
        "eval-deep.json cannot be read: it is nested too deeply",
    ):
        assert any(note in found for found in notes), (note, notes)
    assert complaints == []
    page.close()
