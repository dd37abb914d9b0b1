// The page: controls, and the sections with their charts and tables.

const waiting = new WeakMap(); // card → function that draws it when it comes near the viewport
const drawn = new Set();
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const make = entry.isIntersecting && waiting.get(entry.target);
    if (!make) continue;
    waiting.delete(entry.target);
    const card = entry.target;
    guarded(card.dataset.chart, () => drawn.add({ card, chart: make() }), (note) => card.append(note));
  }
}, { rootMargin: "500px" });
const widths = new ResizeObserver(() => {
  for (const { card, chart } of drawn) {
    const width = Math.max(120, card.querySelector(".plot").clientWidth);
    if (chart && card.isConnected && Math.abs(chart.width - width) > 1) chart.setSize({ width, height: chart.height });
  }
});

// Makes a part of the page; one that cannot be made is replaced by a note, and the other parts are there.
function guarded(what, make, instead = (note) => [note]) {
  try {
    return make();
  } catch (error) {
    return instead(h("p", { class: "note bad" }, `${what} cannot be shown: ${error.message}`));
  }
}

// A card with a chart; settings() returns the arguments of `draw`, or null if there is nothing to draw.
function card(title, settings, { key, extra, name } = {}) {
  const plot = h("div", { class: "plot" }), read = h("div", { class: "read" });
  const element = h("section", { class: "card", "data-chart": name || title },
    h("div", { class: "head" }, h("h3", {}, title), key), plot, read, extra);
  plot.style.minHeight = innerWidth < 640 ? "210px" : "240px";
  waiting.set(element, () => {
    const chart = settings();
    return chart && chart.lines.length ? draw(plot, read, chart) : null;
  });
  near.observe(element);
  widths.observe(element);
  return element;
}

function metricCards(section) {
  const runs = shown(), cards = [];
  for (const reported of report.charts.filter((chart) => chart.section === section)) {
    const keys = Object.keys(reported.lines), pair = keys.every((key) => /^(train|val)\//.test(key));
    const split = report.runs.length > 1 && keys.length > 1 && !pair;
    const charts = split ? keys.map((key) => ({ ...reported, title: `${reported.title}: ${reported.lines[key]}`, lines: { [key]: reported.lines[key] } })) : [reported];
    for (const chart of charts) {
      if (!runs.some(({ run }) => Object.keys(chart.lines).some((key) => run.curves[key]))) continue;
      cards.push(card(chart.title, () => {
        const lines = linesOf(chart, runs);
        return { lines, unit: chart.unit, log: useLog(chart, lines), xLabel: UNITS[state.axis], events: eventsOf(runs) };
      }, { key: legend(chart) }));
    }
  }
  return cards;
}

function legend(chart) {
  const keys = Object.keys(chart.lines).filter((key) => report.runs.some((run) => run.curves[key]));
  if (keys.length < 2) return undefined;
  const mark = (key, i) => {
    const style = report.runs.length > 1 ? (key.startsWith("val/") ? "┄•┄" : "——") : "——";
    return h("span", {}, h("i", { style: `font-style:normal;color:${report.runs.length > 1 ? css("--soft") : colour(i)}` }, style), chart.lines[key]);
  };
  return h("span", { class: "key" }, keys.map(mark));
}

const rampKey = (count) => h("span", { class: "key" }, h("span", {}, "layer 0", h("i", {
  class: "ramp", style: `background:linear-gradient(90deg, ${[0, 0.33, 0.67, 1].map(ramp).join(",")})`,
}), `${count - 1}`));

function layerLines(run, rows, value) {
  const count = rows.y[0].length;
  return Array.from({ length: count }, (_, layer) => ({
    name: `layer ${layer}`, ...curvePoints(run, { x: rows.x, y: rows.y.map((row) => value(row[layer])) }),
    colour: ramp(count > 1 ? layer / (count - 1) : 0), dash: [], width: 1.4, alpha: 1, listed: count <= 12 || layer % Math.ceil(count / 8) === 0 || layer === count - 1,
  })).filter((line) => line.x.length);
}

function layerCards() {
  const number = state.focus, run = report.runs[number], cards = [];
  for (const band of report.spectra) {
    if (run.layers[band.key]) cards.push(...guarded(band.key, () => spectrumCards(run, run.layers[band.key], band)));
  }
  for (const { key, title, unit } of report.layers) {
    const rows = run.layers[key];
    if (!rows || !rows.x.length) continue;
    cards.push(card(title, () => {
      const lines = layerLines(run, rows, (value) => value);
      return { lines, unit, log: useLog({ log: true }, lines), xLabel: UNITS[state.axis], events: eventsOf([{ run, number }]) };
    }, { key: rampKey(rows.y[0].length), name: key }));
  }
  return cards;
}

// Five quantiles per layer, such as those of the channels' half-lives: over the layers at one step, and the medians over
// time.
function spectrumCards(run, rows, { key, title, unit }) {
  const count = rows.y[0].length, last = rows.x.length - 1;
  const where = h("output", {}), slider = h("input", { type: "range", min: 0, max: last, value: last, "aria-label": "step of the spectrum" });
  let chart;
  const columns = (time) => [4, 3, 2, 1, 0].map((q) => rows.y[time].map((layer) => layer[q]));
  const layers = Array.from({ length: count }, (_, layer) => layer);
  const show = () => {
    where.textContent = `step ${exact(rows.x[slider.value])}`;
    if (chart) chart.setData([layers, ...columns(+slider.value), rows.y[0].map((layer) => layer[2])]);
  };
  slider.addEventListener("input", show);
  const all = rows.y.flat(2).filter((value) => value > 0);
  const low = Math.min(...all), high = Math.max(...all);
  const spectrum = card(`${title} over the layers`, () => {
    const names = ["maximum", "90 %", "median", "10 %", "minimum"], main = colour(0);
    const lines = columns(+slider.value).map((y, i) => ({
      name: names[i], x: layers, y, colour: main, dash: [], width: i === 2 ? 2.2 : 0.6, alpha: 1, listed: true, points: i === 2,
    }));
    lines.push({ name: "median at first", x: layers, y: rows.y[0].map((layer) => layer[2]), colour: css("--soft"), dash: [4, 3], width: 1.4, alpha: 1, listed: true });
    const fill = (share) => main + share;
    return {
      lines, unit, log: true, xLabel: "layer", xValues: (at) => (at == null || at % 1 ? "" : `${at}`),
      bands: [{ series: [1, 5], fill: fill("20") }, { series: [2, 4], fill: fill("38") }], yRange: [low, high],
    };
  }, {
    name: key, extra: h("label", { class: "slide" }, "time", slider, where),
    key: h("span", { class: "key" }, h("span", {}, "— median, bands 10–90 % and all channels; ┄ at first")),
  });
  const make = waiting.get(spectrum);
  waiting.set(spectrum, () => (chart = make()));
  show();
  const over = card(`${title}: median over time`, () => {
    const lines = layerLines(run, rows, (layer) => layer && layer[2]);
    return { lines, unit, log: useLog({ log: true }, lines), xLabel: UNITS[state.axis], events: eventsOf([{ run, number: state.focus }]) };
  }, { key: rampKey(count), name: `${key}/median` });
  return [spectrum, over];
}

const FIGURES = [
  ["step", "steps"], ["tokens", "tokens"], ["hours", "time"], ["train_loss", "training loss"], ["val_loss", "validation loss"],
  ["best_val_loss", "best validation"], ["bits_per_byte", "bits/byte"], ["perplexity", "perplexity"], ["tokens_per_second", "tokens/s"],
  ["goodput", "goodput"], ["state", "last event"],
];

function summaryTable() {
  const columns = FIGURES.filter(([key]) => report.runs.some((run) => run.summary[key] != null));
  const duration = (hours) => (hours < 1 ? `${+(hours * 60).toPrecision(3)} min` : `${+hours.toPrecision(4)} h`);
  const cell = (key, value) => (typeof value === "string" ? value : key === "hours" && value != null ? duration(value) : exact(value));
  return table(["run", ...columns.map(([, title]) => title)], report.runs.map((run, number) => [
    h("span", {}, swatch(number), ` ${run.name}`), ...columns.map(([key]) => cell(key, run.summary[key])),
  ]));
}

const swatch = (number) => h("i", { class: "swatch", style: `display:inline-block;vertical-align:middle;background:${report.runs.length > 1 ? colour(number) : colour(0)}` });

function table(head, rows, textual = false) {
  const kind = textual ? { class: "text" } : {};
  return h("div", { class: "card scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, head.map((title) => h("th", kind, title)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", kind, cell)))))));
}

function evaluationCards() {
  const parts = [];
  report.runs.forEach((run) => Object.entries(run.evaluations).forEach(([file, found]) => {
    const about = `${run.name}, ${file}${found.step == null ? "" : `, step ${exact(found.step)}`}`;
    const sources = Array.isArray(found.sources) ? found.sources : [];
    const rows = sources.length > 1 && found.all ? [...sources, found.all] : sources;
    if (rows.length) {
      parts.push(h("div", { class: "card scroll" }, h("h3", {}, about), table(["source", "tokens", "nats/token", "perplexity", "bits/byte"], rows.map((row) => [
        row.name, exact(row.tokens), exact(row.nats_per_token), exact(row.perplexity), exact(row.bits_per_byte)])).firstChild));
      parts.push(card(`Loss by position: ${about}`, () => ({
        lines: rows.map((row, i) => ({
          name: row.name, x: row.by_position.map((bin) => bin.to), y: row.by_position.map((bin) => bin.nats_per_token),
          colour: colour(i), dash: [], width: 1.8, alpha: 1, points: true, listed: true })),
        unit: "nats/token", log: false, xLabel: "tokens of context", xLog: true,
      }), { name: "by_position" }));
    }
    if (found.tasks) parts.push(h("div", { class: "card scroll" }, h("h3", {}, `${about}: tasks`), table(["task", "metric", "value"],
      Object.entries(found.tasks).flatMap(([name, metrics]) => Object.entries(metrics).map(([metric, value]) => [name, metric, typeof value === "string" ? value : exact(value)])), true).firstChild));
  }));
  return parts;
}

function sampleView() {
  const run = report.runs[state.focus];
  if (!run.samples.length) return null;
  const last = run.samples.length - 1, text = h("pre", { class: "sample" }), where = h("output", {});
  const slider = h("input", { type: "range", min: 0, max: last, value: last, "aria-label": "step of the sample" });
  const show = () => { const sample = run.samples[slider.value]; where.textContent = `step ${exact(sample.step)}`; text.textContent = sample.text; };
  slider.addEventListener("input", show);
  show();
  return h("div", { class: "card" }, last ? h("label", { class: "slide" }, "time", slider, where) : h("p", { class: "unit" }, where), text);
}

function eventView() {
  const run = report.runs[state.focus], rows = run.events.filter((event) => event.event !== "checkpoint");
  const saved = run.events.length - rows.length;
  if (!run.events.length) return null;
  const rest = (event) => Object.entries(event.rest).map(([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join(", ");
  const when = ({ time }) => (time && Math.abs(time) < 8e12 ? new Date(time * 1000).toISOString().slice(0, 19).replace("T", " ") : "");
  const list = table(["step", "event", "time (UTC)", "details"], rows.map((event) => [
    exact(event.step), TROUBLE.test(event.event) ? h("b", { style: "color:var(--bad)" }, event.event) : event.event, when(event), rest(event)]), true);
  return h("div", {}, list, saved ? h("p", { class: "unit" }, `and ${exact(saved)} checkpoints`) : null);
}

function focusPicker() {
  if (report.runs.length < 2) return "";
  const pick = h("select", { class: "focus", "aria-label": "run whose details are shown", onchange: (e) => { state.focus = +e.target.value; render(); } },
    report.runs.map((run, number) => h("option", { value: number, selected: number === state.focus }, run.name)));
  return h("span", { style: "font-weight:400;font-size:.85rem" }, " of ", pick);
}

function render() {
  const main = document.getElementById("main");
  main.style.minHeight = `${main.offsetHeight}px`; // keeps the scroll position
  for (const { chart } of drawn) if (chart) chart.destroy();
  drawn.clear(); near.disconnect(); widths.disconnect();
  const section = (title, parts, picked) => (parts.length ? [h("h2", {}, title, picked ? focusPicker() : ""), h("div", { class: "grid" }, parts)] : []);
  const notes = report.runs.flatMap((run) => run.notes.map((note) => h("p", { class: "note bad" }, `${run.name}: ${note}`)));
  const many = report.runs.length > 1, names = [...new Set(report.charts.map((chart) => chart.section))];
  const differences = report.differences.length ? [h("details", { open: report.differences.length <= 12 }, h("summary", {}, `${report.differences.length} settings differ`),
    table(["setting", ...report.runs.map((run) => run.name)], report.differences.map((row) => [row.setting, ...row.values]), true))] : many ? [h("p", { class: "unit" }, "The runs' settings are the same.")] : [];
  const empty = report.runs.some((run) => Object.keys(run.curves).length) ? [] : [h("p", {}, "No step has been logged yet.")];
  const details = [guarded("samples", sampleView, (note) => note), guarded("events", eventView, (note) => note)];
  const cards = (name) => guarded(name, () => metricCards(name));
  main.replaceChildren(
    ...notes, h("h2", {}, many ? "Comparison" : "Summary"), guarded("the summary", summaryTable, (note) => note), ...differences, ...empty,
    ...names.filter((name) => name !== "Other").flatMap((name) => section(name, cards(name))),
    ...section("Layers", guarded("layers", layerCards), true),
    ...section("Other", cards("Other")),
    ...section("Evaluation", guarded("evaluations", evaluationCards)),
    ...(details[0] ? [h("h2", {}, "Samples", focusPicker()), details[0]] : []),
    ...(details[1] ? [h("h2", {}, "Events", focusPicker()), details[1]] : []));
  main.style.minHeight = "";
  chips();
}

function chips() {
  const box = document.getElementById("runs");
  box.replaceChildren(...(report.runs.length < 2 ? [] : report.runs.map((run, number) => h("button", {
    class: "chip", type: "button", "aria-pressed": String(!state.off.has(run.name)),
    onclick: () => { if (!state.off.delete(run.name)) state.off.add(run.name); render(); },
  }, h("i", { class: "swatch", style: `background:${colour(number)}` }), run.name))));
  const steps = Math.max(...report.runs.map((run) => run.summary.step));
  document.getElementById("about").textContent = `${report.runs.length > 1 ? `${report.runs.length} runs, ` : ""}up to step ${exact(steps)}${document.body.dataset.live === "true" ? ", live" : ""}`;
}

function themed() {
  const wish = document.getElementById("theme").value, system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = wish === "auto" ? system : wish;
}

for (const name of ["axis", "scale", "curves", "events"]) {
  document.getElementById(name).addEventListener("change", (event) => {
    state[name] = name === "events" ? event.target.checked : event.target.value;
    render();
  });
}
document.getElementById("theme").addEventListener("change", () => { themed(); render(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { themed(); render(); });

load(JSON.parse(document.getElementById("data").textContent));
for (const option of document.getElementById("axis").options) option.disabled = option.value !== "step" && !report.runs.some((run) => run.clock[option.value]);
themed();
render();

if (document.body.dataset.live === "true") {
  let seen = null;
  const ask = async () => {
    try {
      const answer = await fetch("data.json", { headers: seen ? { "If-None-Match": seen } : {} });
      if (answer.status === 200) {
        seen = answer.headers.get("ETag");
        load(await answer.json());
        render();
      }
      document.getElementById("about").style.opacity = 1;
    } catch {
      document.getElementById("about").style.opacity = 0.4; // the server is gone: dim the status, keep the data
    }
    setTimeout(ask, 3000);
  };
  setTimeout(ask, 1000);
}
