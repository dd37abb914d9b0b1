"use strict";
// Turns the report's data into charts. view.js follows in the same script and builds the page.

const COLOURS = {
  light: ["#0f62ae", "#c8500a", "#117a57", "#a62c72", "#866a00", "#5a50c4", "#1c7f96", "#61666e"],
  dark: ["#6cb4f5", "#ff9a57", "#4ecb9b", "#f08cc4", "#e0c040", "#a9a3ff", "#7fd3e6", "#b9bec6"],
};
const RAMPS = { light: ["#3b0f70", "#8c2981", "#d3436e", "#f08a4b"], dark: ["#9a86ff", "#d070c8", "#ff8a7a", "#ffd48a"] };
const UNITS = { step: "optimiser steps", tokens: "tokens", hours: "hours" };
const TROUBLE = /bad|nan|spike|rewound|rewind|alert|fail|unhealthy|lost|dead|hang|damage|refused/i;
const QUIET = /^(started|checkpoint|saved)/i;

const state = { axis: "step", scale: "auto", curves: "both", events: true, off: new Set(), focus: 0 };
let report;

function load(data) {
  for (const run of data.runs) {
    for (const part of [run.curves, run.layers, run.clock, run.summary]) Object.setPrototypeOf(part, null); // keys are any text
    for (const curve of Object.values(run.curves)) {
      accumulate(curve.x);
      if (curve.trend) accumulate(curve.trend.x);
    }
  }
  report = data;
  state.focus = Math.min(state.focus, data.runs.length - 1);
}

function accumulate(differences) {
  for (let i = 1; i < differences.length; i++) differences[i] += differences[i - 1];
}

const shown = () => report.runs.map((run, number) => ({ run, number })).filter(({ run }) => !state.off.has(run.name));
const dark = () => document.documentElement.dataset.theme === "dark";
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (number) => COLOURS[dark() ? "dark" : "light"][number % 8];
const dash = (number) => (number % 16 < 8 ? [] : [7, 3]);

function ramp(share) {
  const stops = RAMPS[dark() ? "dark" : "light"].map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
  const at = share * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
  return `rgb(${stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low))).join(" ")})`;
}

function compact(value) {
  if (value == null) return "";
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return `${+(value / (limit === 1e4 ? 1e3 : limit)).toPrecision(4)}${letter}`;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential(1).replace(".0", "") : `${+value.toPrecision(4)}`;
}

function exact(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e12) return compact(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return size !== 0 && size < 1e-3 ? value.toExponential(3) : `${+value.toPrecision(5)}`;
}

// The position of a step on the chosen axis, by linear interpolation of the run's clock; null without a clock.
function axisValue(run, step) {
  if (state.axis === "step") return step;
  const clock = run.clock[state.axis];
  if (!clock || !clock.x.length) return null;
  const { x, y } = clock;
  let low = 0, high = x.length - 1;
  if (step <= x[0]) return x[0] ? (y[0] * step) / x[0] : y[0];
  if (step >= x[high]) return y[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= step) low = middle; else high = middle;
  }
  return y[low] + ((y[high] - y[low]) * (step - x[low])) / (x[high] - x[low]);
}

function curvePoints(run, curve) {
  const x = [], y = [];
  curve.x.forEach((step, i) => {
    const position = axisValue(run, step);
    if (position != null && curve.y[i] != null) { x.push(position); y.push(curve.y[i]); }
  });
  return { x, y };
}

// The lines of a chart: {name, x, y, colour, dash, width, alpha, points, listed}; listed: its value is shown at the cursor.
function linesOf(chart, runs) {
  const keys = Object.keys(chart.lines), lines = [];
  runs.forEach(({ run, number }) => keys.forEach((key, which) => {
    const curve = run.curves[key];
    if (!curve) return;
    const own = report.runs.length > 1 ? number : which, isValidation = key.startsWith("val/");
    const name = report.runs.length > 1 ? (keys.length > 1 ? `${run.name} ${chart.lines[key]}` : run.name) : chart.lines[key];
    const look = { name, colour: colour(own), dash: dash(own) };
    const smooth = curve.trend && !isValidation;
    if (!smooth || state.curves !== "trend") {
      const faded = smooth && state.curves === "both";
      lines.push({ ...look, ...curvePoints(run, curve), width: faded ? 1 : 1.6, alpha: faded ? Math.max(0.12, 0.36 - 0.06 * runs.length) : 1, points: isValidation, listed: !faded });
      if (isValidation && report.runs.length > 1) lines[lines.length - 1].dash = [4, 3];
    }
    if (smooth && state.curves !== "all") lines.push({ ...look, ...curvePoints(run, curve.trend), width: 2, alpha: 1, listed: true });
  }));
  lines.sort((a, b) => a.alpha - b.alpha); // draw trends above their curves
  return lines.filter((line) => line.x.length);
}

function useLog(chart, lines) {
  let low = Infinity, high = -Infinity;
  for (const line of lines) for (const value of line.y) { if (value < low) low = value; if (value > high) high = value; }
  return low > 0 && (state.scale === "log" || (state.scale === "auto" && chart.log && high / low > 20));
}

function nearest(x, at) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (x[middle] <= at) low = middle; else high = middle; }
  return Math.abs(x[high] - at) < Math.abs(x[low] - at) ? high : low;
}

// Draws lines into `plot`, and shows the values under the cursor in `read`.
function draw(plot, read, { lines, unit, log, xLabel, xLog, events, bands, xValues, yRange }) {
  const data = uPlot.join(lines.map((line) => [line.x, line.y]));
  const ink = css("--soft"), grid = { stroke: css("--grid"), width: 1 }, font = "11px system-ui, sans-serif";
  const axis = { stroke: ink, grid, ticks: { ...grid, size: 4 }, font, labelFont: font, labelSize: 18, labelGap: 0 };
  const showValues = () => {
    const at = chart.cursor.idx == null || chart.cursor.left < 0 ? null : chart.posToVal(chart.cursor.left, "x");
    read.replaceChildren();
    if (at == null || !plot.matches(":hover")) return; // the synchronised cursors of other charts show no values
    const box = read.appendChild(h("div"));
    const near = (events || []).find((e) => Math.abs(chart.valToPos(e.x, "x") - chart.cursor.left) < 5);
    box.append(h("b", {}, xValues ? xValues(Math.round(at)) : exact(xLabel === UNITS.hours ? at : Math.round(at))), ` ${xLabel}`);
    for (const line of lines.filter((l) => l.listed).slice(0, 10)) {
      const i = nearest(line.x, at);
      if (line.x[i] != null) box.append("  ", h("span", { class: "dot", style: `color:${line.colour}` }, "● "), `${line.name} `, h("b", {}, exact(line.y[i])));
    }
    if (near) box.append("  ", h("b", { style: `color:${near.colour}` }, `▏${near.text}`));
  };
  const chart = new uPlot({
    width: Math.max(120, plot.clientWidth), height: innerWidth < 640 ? 210 : 240, legend: { show: false }, padding: [8, 20, 0, 0],
    cursor: { points: { size: 6 }, drag: { x: true, y: false }, sync: { key: xLabel } },
    scales: {
      x: { time: false, distr: xLog ? 3 : 1 },
      y: log ? { distr: 3, range: (u, low, high) => uPlot.rangeLog(...(yRange || [low, high]), 10, false) } : {},
    },
    axes: [
      { ...axis, label: xLabel, size: 26, values: (u, at) => at.map(xValues || compact), space: 60 },
      { ...axis, label: unit || undefined, labelSize: unit ? 18 : 0, size: 52, values: (u, at) => at.map(compact), space: 34 },
    ],
    series: [{}, ...lines.map((line) => ({
      label: line.name, stroke: line.colour, width: line.width, dash: line.dash, alpha: line.alpha,
      points: { show: !!line.points || line.x.length < 3, size: 5, fill: line.colour, width: 0 },
    }))],
    bands,
    hooks: { setCursor: [showValues], drawAxes: [(u) => drawEvents(u, events || [])] },
  }, data, plot);
  return chart;
}

function drawEvents(u, events) {
  const { ctx, bbox } = u, scale = devicePixelRatio;
  ctx.save();
  for (const event of events) {
    const x = Math.round(u.valToPos(event.x, "x", true)) + 0.5;
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.strokeStyle = event.colour;
    ctx.globalAlpha = event.quiet ? 0.5 : 0.75;
    ctx.lineWidth = scale;
    ctx.setLineDash(event.trouble || event.quiet ? [] : [4 * scale, 3 * scale]);
    ctx.beginPath();
    ctx.moveTo(x, event.quiet ? bbox.top + bbox.height - 5 * scale : bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

function eventsOf(runs) {
  if (!state.events) return [];
  return runs.flatMap(({ run, number }) => run.events.map((event) => {
    const trouble = TROUBLE.test(event.event), quiet = !trouble && QUIET.test(event.event);
    const text = `${event.event}${event.rest.kind ? ` (${event.rest.kind})` : ""}, step ${exact(event.step)}${report.runs.length > 1 ? ` (${run.name})` : ""}`;
    const own = report.runs.length > 1 ? colour(number) : css("--soft");
    return { x: axisValue(run, event.step), text, trouble, quiet, colour: trouble ? css("--bad") : own };
  })).filter((event) => event.x != null);
}

// Creates an element with attributes and children; strings become text nodes, so they are never parsed as HTML.
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value != null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}
