"use strict";
// Owns the charts: Plotly draws them, this chooses what they hold. Colour and symbol belong to an attention everywhere.

const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31"];
const MOST_LINES = 10;
const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star", "hexagon", "pentagon", "bowtie"];

function styleOf(attention, attentions) {
  const place = Math.max(0, attentions.indexOf(attention));
  return { color: COLOURS[place % COLOURS.length], symbol: SYMBOLS[Math.floor(place / COLOURS.length + place) % SYMBOLS.length] };
}

function layoutFor(extra, narrow) {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  return {
    paper_bgcolor: colour("--page"), plot_bgcolor: colour("--page"), font: { color: colour("--text"), size: 13 },
    margin: { l: 55, r: 15, t: 15, b: 50 }, hovermode: "closest", hoverlabel: { align: "left", namelength: -1 },
    legend: narrow ? { orientation: "h", y: -0.25, yanchor: "top", x: 0, font: { size: 11 } } : { x: 1.01, y: 1 },
    ...extra, xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
  };
}

function draw(id, traces, extra, emptyWords) {
  const place = document.getElementById(id);
  place.classList.toggle("empty", !traces.length);
  if (!traces.length) {
    Plotly.purge(place);
    place.replaceChildren(emptyWords);
    return Promise.resolve();
  }
  if (!place.querySelector(".plotly")) place.replaceChildren();
  const narrow = place.clientWidth < 620;
  const names = new Set(traces.filter((trace) => trace.showlegend !== false).map((trace) => trace.name)).size;
  const height = (extra.height ?? 430) + (narrow ? 12 * names : 0);
  return Plotly.react(place, traces, { ...layoutFor(extra, narrow), height }, { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover" });
}

// 1, 2, 5 in each decade, written out: Plotly's own labels of a logarithmic axis drop the decade.
function logAxis(values, words) {
  const [low, high] = [Math.log10(Math.min(...values)), Math.log10(Math.max(...values))];
  const margin = Math.max(0.08 * (high - low), 0.05);
  const span = high - low;
  const steps = span > 2.5 ? [1] : span > 1 ? [1, 2, 5] : span > 0.4 ? [1, 1.5, 2, 3, 5, 7] : [1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9];
  const ticks = [];
  for (let decade = Math.floor(low - margin); decade <= high + margin; decade += 1) ticks.push(...steps.map((step) => Number(`${step}e${decade}`)));
  const inside = ticks.filter((tick) => Math.abs(Math.log10(tick) - (low + high) / 2) <= (high - low) / 2 + margin);
  const shown = inside.length > 1 ? inside : values.filter((value, place) => values.indexOf(value) === place);
  return { type: "log", range: [low - margin, high + margin], tickvals: shown, ticktext: shown.map(grouped), title: { text: words } };
}

function groupBy(items, key) {
  const groups = new Map();
  for (const item of items) {
    if (!groups.has(key(item))) groups.set(key(item), []);
    groups.get(key(item)).push(item);
  }
  return groups;
}

function drawScatter(runs, column, attentions) {
  const traces = [...groupBy(runs, (run) => run.row[0])].sort().map(([attention, group]) => ({
    type: "scatter", mode: "markers", name: attention, marker: { ...styleOf(attention, attentions), size: 11, opacity: 0.85, line: { width: 1, color: "#ffffff" } },
    x: group.map((run) => run.speed), y: group.map((run) => run.accuracy), customdata: group.map((run) => run.id),
    hovertext: group.map((run) => [`<b>${attention}</b>, seed ${run.seed}`, `${fixed(run.accuracy, 2)} %, ${grouped(run.speed)} examples/s, ${grouped(run.memory)} MiB`, `run ${run.id}`, shortSetting(run.row), `commit ${run.commit.slice(0, 12)}`, run.hardware].join("<br>")),
    hoverinfo: "text",
  }));
  const speeds = runs.map((run) => run.speed);
  const majority = runs.length ? column.majority : [];
  const shapes = majority.map((value) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { dash: "dash", width: 1, color: "#888888" } }));
  return draw("scatter", traces, { shapes, xaxis: logAxis(speeds, "training examples per second"), yaxis: { title: { text: "test accuracy (%)" } } }, "No finished run matches the filters.");
}

function drawCurves(runs, kind, attentions) {
  const dashes = ["solid", "dash", "dot", "dashdot", "longdash"];
  const seeds = [...new Set(runs.map((run) => run.seed))].sort((a, b) => a - b);
  const percent = kind === "validation" ? 100 : 1;
  const traces = runs.map((run) => ({
    type: "scatter", mode: run[kind].length > 40 ? "lines" : "lines+markers", name: `${run.row[0]}, seed ${run.seed}`,
    line: { color: styleOf(run.row[0], attentions).color, dash: dashes[seeds.indexOf(run.seed) % dashes.length] },
    marker: { symbol: styleOf(run.row[0], attentions).symbol, size: 7 },
    x: run[kind].map((point) => point[0]), y: run[kind].map((point) => percent * point[1]),
    hovertemplate: `<b>${run.row[0]}</b>, seed ${run.seed}<br>step %{x}: %{y:.4g}<br>run ${run.id}<extra></extra>`,
  }));
  return draw("curves", traces, { xaxis: { title: { text: "step" } }, yaxis: { title: { text: percent === 100 ? "validation accuracy (%)" : "training loss" } } }, "Choose one run or more.");
}

// Where several tasks have one length: their middle.
function atEachLength(rows, kind) {
  return [...groupBy(rows, (row) => row.length).values()].map((same) => {
    const ordered = [...same].sort((a, b) => a[kind] - b[kind]);
    const shapes = same.map((row) => `${row.task}, batch ${row.batch}, ${row.runs} run${row.runs === 1 ? "" : "s"}`);
    return { ...ordered[Math.floor(ordered.length / 2)], shapes: shapes.join("<br>") };
  }).sort((a, b) => a.length - b.length);
}

// Of more attentions than a chart can tell apart: softmax, and those that are best at the greatest length.
function fewLines(rows, kind) {
  const lines = linesOf(rows, kind);
  const names = new Set(lines.map((line) => line[0].attention));
  if (names.size <= MOST_LINES) return { lines, shown: names.size, left: 0, softmax: 0 };
  const sign = kind === "memory" ? 1 : -1;
  const ends = lines.map((line) => line.at(-1)).sort((a, b) => b.length - a.length || sign * (a[kind] - b[kind]));
  const best = [...new Set(ends.map((row) => row.attention).filter((attention) => attention !== "softmax"))].slice(0, MOST_LINES - 1);
  const kept = new Set(names.has("softmax") ? [...best, "softmax"] : best);
  return { lines: lines.filter((line) => kept.has(line[0].attention)), shown: kept.size, left: names.size - kept.size, softmax: kept.size - best.length };
}

const ofBenchmark = (row) => row.task === "benchmark";

// One per attention, precision, machine and kind of measurement that has more than one length.
function linesOf(rows, kind) {
  const held = rows.filter((row) => row[kind] !== null);
  const groups = groupBy(held, (row) => [row.attention, row.precision, row.hardware, ofBenchmark(row)].join("|"));
  return [...groups.values()].map((group) => atEachLength(group, kind)).filter((line) => line.length > 1);
}

function drawLengths(lines, kind, words, attentions) {
  const shown = lines.flat();
  const hardware = new Set(shown.map((row) => row.hardware)).size > 1;
  const traces = lines.map((ordered) => {
    const first = ordered[0];
    const { color, symbol } = styleOf(first.attention, attentions);
    return {
      type: "scatter", mode: "lines+markers",
      name: [first.attention, ofBenchmark(first) ? "benchmark" : "", hardware ? first.hardware : ""].filter(Boolean).join(", "),
      line: { color, dash: ofBenchmark(first) ? "dash" : "solid" }, marker: { symbol, size: 9 }, x: ordered.map((row) => row.length), y: ordered.map((row) => row[kind]),
      hovertext: ordered.map((row) => `<b>${row.attention}</b>, length ${row.length}<br>${grouped2(row[kind])} ${words}<br>${row.shapes}<br>${row.precision}, ${row.hardware}`), hoverinfo: "text",
    };
  });
  return draw("lengths", traces, { xaxis: logAxis(shown.map((row) => row.length), "length in tokens"), yaxis: logAxis(shown.map((row) => row[kind]), words) }, "The runs that match the filters hold one length per attention: nothing to draw against length yet.");
}

function drawRanks(ranks, named) {
  if (!ranks || ranks.why) {
    document.getElementById("ranks-words").textContent = "";
    return draw("ranks", [], {}, ranks ? `No ranks: ${ranks.why}.` : "No finished run matches the filters.");
  }
  const all = Object.keys(ranks.mean);
  const names = all.filter(named);
  const verdict = ranks.friedman < 0.05 ? "the attentions differ" : "no difference between the attentions is shown, whatever the bars say";
  if (!names.length) {
    document.getElementById("ranks-words").textContent = "";
    return draw("ranks", [], {}, "No attention with a rank matches the filters.");
  }
  const more = ranks.leftOut.length > 8 ? ` and ${ranks.leftOut.length - 8} more` : "";
  const left = ranks.leftOut.length ? ` Left out, because a task is missing: ${ranks.leftOut.slice(0, 8).join(", ")}${more}.` : "";
  document.getElementById("ranks-words").textContent = `Of ${all.length} attentions, over ${ranks.tasks.join(", ")}. Friedman's test: p = ${probability(ranks.friedman)}, ${verdict}. Critical difference ${fixed(ranks.critical, 2)}.${left}`;
  const ordered = [...names].sort((a, b) => ranks.mean[a] - ranks.mean[b]).reverse();
  const trace = {
    type: "scatter", mode: "markers", showlegend: false, x: ordered.map((name) => ranks.mean[name]), y: ordered,
    error_x: { type: "constant", value: ranks.critical / 2, thickness: 2 }, marker: { size: 10, color: COLOURS[0] }, hovertemplate: "%{y}: mean rank %{x}<extra></extra>",
  };
  return draw("ranks", [trace], { height: 130 + 26 * names.length, xaxis: { title: { text: "mean rank (1 is best)" } }, yaxis: { type: "category", tickmode: "linear" } }, "");
}
