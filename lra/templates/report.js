"use strict";
// Owns the page: unpacks the content, holds what was chosen, and renders all parts from it.

const RUNS_AT_ONCE = 100;
const OPEN_FIGURES = 6; // more are behind the names of their studies
const report = {
  content: null, attentions: [], byId: new Map(),
  filters: { experiment: "", protocol: "", task: "", source: "", hardware: "" }, words: [],
  accuracySort: { column: 0, descending: false }, pairsSort: { column: 7, descending: false }, runsSort: { column: 2, descending: false },
  curves: null, shownRuns: RUNS_AT_ONCE, paper: "",
};
const byId = (id) => document.getElementById(id);
const unique = (values) => [...new Set(values)].sort();

async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (character) => character.charCodeAt(0));
  byId(id).remove();
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("it needs a browser of 2023 or later");
  report.content = JSON.parse(await unpack("packed-content"));
  document.head.append(element("script", {}, await unpack("packed-plotly")));
  report.content.runs.forEach((run, place) => { run.place = place; if (!report.byId.has(run.id)) report.byId.set(run.id, run); });
  report.columns = new Map(report.content.columns.map((column) => [column.name, column]));
  report.attentions = unique([...report.content.runs.map((run) => run.row[0]), ...report.content.lengths.map((row) => row.attention)]);
  makeFilters();
  wire();
  makeFigures();
  render();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", renderCharts);
  document.documentElement.dataset.ready = "true";
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, words]) => element("option", { value, selected: value === chosen }, words)));
}

function makeFilters() {
  const { runs, columns } = report.content;
  const choices = {
    experiment: unique(runs.map((run) => run.experiment).filter(Boolean)), protocol: unique(runs.map((run) => run.row[1])),
    task: [...new Set(columns.map((column) => column.task))], source: unique(columns.map((column) => column.source)),
    hardware: unique(runs.map((run) => run.hardware)),
  };
  const words = { experiment: "Experiment", protocol: "Protocol", task: "Task", source: "Data source", hardware: "Hardware" };
  for (const [name, values] of Object.entries(choices)) {
    const select = element("select", { id: `filter-${name}`, onchange: () => { report.filters[name] = select.value; report.curves = null; report.shownRuns = RUNS_AT_ONCE; render(); } });
    fill(select, [["", "all"], ...values.map((value) => [value, value])], "");
    byId("filters").append(element("label", {}, words[name], select));
  }
  const names = element("input", { id: "filter-attention", type: "search", placeholder: "all, or: softmax schoenbat", oninput: () => { report.words = names.value.toLowerCase().split(/[\s,]+/).filter(Boolean); report.curves = null; report.shownRuns = RUNS_AT_ONCE; render(); } });
  byId("filters").append(element("label", {}, "Attention (parts of names)", names));
  byId("filters").append(element("button", { id: "reset", type: "button", onclick: reset }, "Reset"));
  fill(byId("paper"), [["", "none"], ...report.content.papers.map((paper) => [paper.key, paper.title])], "");
}

function reset() {
  for (const name of Object.keys(report.filters)) { report.filters[name] = ""; byId(`filter-${name}`).value = ""; }
  byId("search").value = byId("filter-attention").value = "";
  report.words = [];
  report.curves = null;
  render();
}

function wire() {
  byId("paper").addEventListener("change", renderAccuracy);
  byId("scatter-column").addEventListener("change", renderScatter);
  byId("curves-column").addEventListener("change", () => { report.curves = null; renderCurves(); });
  byId("curves-kind").addEventListener("change", renderCurves);
  byId("curves-runs").addEventListener("change", () => { report.curves = [...byId("curves-runs").selectedOptions].map((option) => Number(option.value)); renderCurves(); });
  byId("lengths-kind").addEventListener("change", renderLengths);
  byId("ranks-setting").addEventListener("change", renderRanks);
  byId("search").addEventListener("input", () => { report.shownRuns = RUNS_AT_ONCE; renderRuns(); });
  byId("run-a").addEventListener("input", renderDifference);
  byId("run-b").addEventListener("input", renderDifference);
}

const columnFits = (column) => (!report.filters.task || column.task === report.filters.task) && (!report.filters.source || column.source === report.filters.source);

const named = (attention) => !report.words.length || report.words.some((word) => attention.toLowerCase().includes(word));

function fits(run) {
  const { experiment, protocol, hardware } = report.filters;
  return named(run.row[0]) && (!experiment || run.experiment === experiment) && (!protocol || run.row[1] === protocol) && (!hardware || run.hardware === hardware) && columnFits(report.columns.get(run.column));
}

const sheet = () => report.content.sheets[`${report.filters.experiment}|${report.filters.hardware}`] ?? { rows: [], ranks: {} };

function render() {
  report.runs = report.content.runs.filter(fits);
  renderAccuracy();
  renderPairs();
  renderRuns();
  renderDifference();
  renderCharts();
}

function renderCharts() {
  renderScatter();
  renderCurves();
  renderLengths();
  renderRanks();
}

function renderAccuracy() {
  const all = sheet().rows.filter((row) => named(row.row[0]) && (!report.filters.protocol || row.row[1] === report.filters.protocol));
  const columns = report.content.columns.filter((column) => columnFits(column) && all.some((row) => row.cells[column.name]));
  const rows = all.filter((row) => columns.some((column) => row.cells[column.name]));
  if (!rows.length) {
    byId("accuracy-table").replaceChildren(element("p", {}, "No run matches the filters."));
    byId("footnotes").replaceChildren();
    return;
  }
  const paper = report.content.papers.find((one) => one.key === byId("paper").value);
  const sort = (column) => { report.accuracySort = nextSort(report.accuracySort, column, column > 0); renderAccuracy(); };
  const { table, notes } = accuracyTable(rows, columns, paper, report.accuracySort, sort, openCell);
  keepPlace(byId("accuracy-table"), table);
  byId("footnotes").replaceChildren(...notes);
}

// After a click on a header the new header has the focus, and a table stays scrolled where it was.
function keepPlace(container, made) {
  const old = container.querySelector(".scroll");
  const focused = [...container.querySelectorAll("thead button")].indexOf(document.activeElement);
  container.replaceChildren(made);
  if (old) made.scrollLeft = old.scrollLeft;
  if (focused >= 0) made.querySelectorAll("thead button")[focused]?.focus({ preventScroll: true });
}

const actions = {
  open: (run) => provenance(byId("provenance"), `${run.row[0]}, ${run.column}`, [run], actions),
  pick: (side, run) => { byId(`run-${side}`).value = run.id; byId("provenance").close(); renderDifference(); },
  curve: (run) => {
    byId("provenance").close();
    const shown = byId("curves-column").value === run.column ? currentCurves().map((one) => one.place) : [];
    byId("curves-column").value = run.column;
    report.curves = [...new Set([...shown, run.place])];
    renderCurves();
    byId("curves-title").scrollIntoView();
  },
};

function openCell(row, column, cell) {
  provenance(byId("provenance"), `${row.row[0]}, ${column.name}: ${cellContent(cell).filter(Boolean).join(", ")}`, cell.runs.map((place) => report.content.runs[place]), actions);
}

function renderPairs() {
  const { protocol, experiment, hardware } = report.filters;
  const rows = report.content.comparisons.filter((row) => (named(row.attention) || named(row.reference)) && columnFits(report.columns.get(row.column)) && (!protocol || row.setting.split(" · ")[0] === protocol));
  const sort = (column) => { report.pairsSort = nextSort(report.pairsSort, column, column === 3 || column === 4); renderPairs(); };
  const note = experiment || hardware ? [element("p", { class: "notes" }, "Over all experiments and hardware: these two filters do not act here.")] : [];
  if (rows.length) keepPlace(byId("pairs"), element("div", {}, ...note, pairsTable(rows, report.pairsSort, sort)));
  else byId("pairs").replaceChildren(element("p", {}, report.content.comparisons.length ? "No comparison matches the filters." : "No two attentions have finished on the same seed and the same test examples."));
}

function renderRuns() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (run) => [run.id, run.column, ...run.row, run.status, run.hardware, run.experiment, run.commit].join(" ").toLowerCase();
  const found = report.runs.filter((run) => words.every((word) => text(run).includes(word)));
  const sort = (column) => { report.runsSort = nextSort(report.runsSort, column, column >= 7 && column <= 9); renderRuns(); };
  const all = runsTable(found, report.runsSort, sort, actions, report.shownRuns);
  const more = found.length > report.shownRuns ? [element("button", { type: "button", onclick: () => { report.shownRuns += RUNS_AT_ONCE; renderRuns(); } }, `Show more (${report.shownRuns} of ${found.length})`)] : [];
  keepPlace(byId("runs"), element("div", {}, found.length ? all : element("p", {}, "No run matches."), ...more));
  byId("run-ids").replaceChildren(...report.runs.slice(0, 500).map((run) => element("option", { value: run.id }, `${run.row[0]}, ${run.column}, seed ${run.seed}`)));
}

function renderDifference() {
  const typed = ["a", "b"].map((side) => byId(`run-${side}`).value.trim());
  const picked = typed.map((id) => report.byId.get(id));
  if (picked.every(Boolean)) byId("difference").replaceChildren(...differenceTable(...picked, report.content.parts));
  else {
    const unknown = typed.filter((id, place) => id && !picked[place]);
    byId("difference").replaceChildren(element("p", { class: "notes" }, unknown.length ? `No run is called ${unknown.join(" or ")}.` : "Name two runs, or press A and B in the table of runs."));
  }
}

function fillColumns(select) {
  const held = new Set(report.runs.filter((run) => run.accuracy !== undefined).map((run) => run.column));
  const names = report.content.columns.map((column) => column.name).filter((name) => held.has(name));
  const chosen = names.includes(select.value) ? select.value : names[0] ?? "";
  fill(select, names.map((name) => [name, name]), chosen);
  select.value = chosen;
  return chosen;
}

function renderScatter() {
  const column = fillColumns(byId("scatter-column"));
  return drawScatter(report.runs.filter((run) => run.column === column && run.accuracy !== undefined), report.columns.get(column), report.attentions);
}

// Unless others were chosen: the lowest seed of the first six attentions.
function currentCurves() {
  const column = byId("curves-column").value;
  const here = report.runs.filter((run) => run.column === column && run.validation);
  if (report.curves) return here.filter((run) => report.curves.includes(run.place));
  const first = new Map();
  for (const run of here) if (!first.has(run.row[0]) || first.get(run.row[0]).seed > run.seed) first.set(run.row[0], run);
  return [...first.values()].slice(0, 6);
}

function renderCurves() {
  const column = fillColumns(byId("curves-column"));
  const chosen = currentCurves();
  const here = report.runs.filter((run) => run.column === column && run.validation);
  const select = byId("curves-runs");
  const scrolled = select.scrollTop;
  fill(select, here.map((run) => [String(run.place), `${run.row[0]}, seed ${run.seed}, ${shortSetting(run.row)}`]), null);
  for (const option of select.options) option.selected = chosen.some((run) => String(run.place) === option.value);
  select.scrollTop = scrolled;
  return drawCurves(chosen, byId("curves-kind").value, report.attentions);
}

function renderLengths() {
  const { task, hardware } = report.filters;
  const rows = report.content.lengths.filter((row) => named(row.attention) && (!task || row.task === task) && (!hardware || row.hardware === hardware));
  const select = byId("lengths-kind");
  const few = fewLines(rows, select.value);
  byId("lengths-words").textContent = few.left ? `Of ${few.shown + few.left} attentions: ${few.softmax ? "softmax and " : ""}the ${few.shown - few.softmax} best at the greatest length. Name others above, under Attention.` : "";
  return drawLengths(few.lines, select.value, select.selectedOptions[0].textContent, report.attentions);
}

function renderRanks() {
  const ranks = sheet().ranks;
  const settings = Object.keys(ranks).filter((setting) => !report.filters.protocol || setting.split(" · ")[0] === report.filters.protocol).sort();
  const select = byId("ranks-setting");
  const chosen = settings.includes(select.value) ? select.value : settings.find((setting) => ranks[setting].mean) ?? settings[0] ?? "";
  fill(select, settings.map((setting) => [setting, shortSetting(["", ...setting.split(" · ")])]), chosen);
  return drawRanks(ranks[chosen], named);
}

function makeFigures() {
  const { figures, figuresLeftOut } = report.content;
  byId("studies").hidden = !figures.length && !figuresLeftOut.length;
  const drawn = (one) => element("figure", {}, element("img", { src: one.image, alt: `Figure of the study ${one.study}: ${one.name}` }), element("figcaption", {}, `${one.study}: ${one.name} (${one.path})`));
  const made = [...groupBy(figures, (one) => one.study)].map(([study, group]) =>
    element("details", { open: figures.length <= OPEN_FIGURES }, element("summary", {}, `${study} (${group.length} figure${group.length === 1 ? "" : "s"})`), ...group.map(drawn)));
  const left = figuresLeftOut.length ? [element("p", { class: "notes" }, `Not embedded, for their size: ${figuresLeftOut.join(", ")}`)] : [];
  byId("figures").replaceChildren(...made, ...left);
}

start().catch((error) => {
  byId("failure").hidden = false;
  byId("failure").textContent = `The report could not be shown: ${error.message}`;
  throw error;
});
