"use strict";
// Owns the tables and the dialog: content in, elements out. Text goes in as text, never as mark-up.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const fixed = (value, digits = 1) => value.toFixed(digits);
const grouped = (value) => value.toLocaleString("en-US", { maximumFractionDigits: value < 10 ? 2 : 0 });
const probability = (value) => (value < 0.001 ? value.toExponential(0) : value.toFixed(3));
const settingOf = (row) => row.slice(1).filter((part) => part).join(" · ");
const shortSetting = (row) => {
  const settings = row[3] ? row[3].split(", ") : [];
  const shown = settings.length > 2 ? `${settings.length} overrides` : settings.join(", ");
  return [row[1], row[2], shown].filter((part) => part).join(" · ");
};

// A table whose headers sort. columns: {title, note, key(row) -> number or text, cell(row) -> element, text}.
function sortableTable(columns, rows, sort, onSort, caption, limit = Infinity) {
  const order = [...rows];
  if (columns[sort.column]) {
    const key = columns[sort.column].key;
    order.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      const result = x < y ? -1 : x > y ? 1 : 0;
      return sort.descending ? -result : result;
    });
  }
  const heads = columns.map((column, place) => {
    const active = sort.column === place;
    const arrow = active ? (sort.descending ? " ▼" : " ▲") : "";
    const button = element("button", { type: "button", onclick: () => onSort(place) }, column.title + arrow);
    const state = active ? (sort.descending ? "descending" : "ascending") : "none";
    return element("th", { scope: "col", "aria-sort": state, class: column.text ? "text" : null },
      button, column.note ? element("small", {}, column.note) : null);
  });
  const body = element("tbody");
  for (const row of order.slice(0, limit)) {
    body.append(element("tr", {}, ...columns.map((column) => column.cell(row))));
    for (const below of row.below ?? []) body.append(below);
  }
  const table = element("table", {}, element("caption", { hidden: true }, caption), element("thead", {}, element("tr", {}, ...heads)), body);
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
}

function nextSort(sort, column, descendingFirst) {
  if (sort.column === column) return { column, descending: !sort.descending };
  return { column, descending: descendingFirst };
}

// ---- accuracy ------------------------------------------------------------------------------------------------------

function cellContent(cell) {
  if (!cell) return ["–", ""];
  if (cell.mean === undefined) return [cell.lost.join("/").replace("oom", "OOM"), ""];
  const spread = cell.std === undefined ? "" : ` ± ${fixed(cell.std)}`;
  const interval = cell.std === undefined ? "" : ` · ${fixed(cell.low)} to ${fixed(cell.high)}`;
  const lost = cell.lostCount ? ` · ${cell.lostCount} did not finish` : "";
  return [fixed(cell.mean) + spread, `n ${cell.n}${interval}${lost}`];
}

function averageOf(row, columns) {
  const means = columns.map((column) => row.cells[column.name]?.mean);
  return means.length && means.every((mean) => mean !== undefined) ? means.reduce((a, b) => a + b) / means.length : null;
}

function accuracyCell(row, column, best, open) {
  const cell = row.cells[column.name];
  const [figure, small] = cellContent(cell);
  if (!cell) return element("td", {}, figure);
  const name = `${row.row[0]}, ${column.name}: ${figure}; show the runs behind it`;
  const button = element("button", { class: "cell", type: "button", "aria-label": name, onclick: () => open(row, column, cell) },
    element("span", {}, figure), small ? element("small", {}, small) : null);
  const leads = cell.mean !== undefined && cell.mean === best.get(column.name + settingOf(row.row));
  return element("td", { class: leads ? "best" : null }, button);
}

function publishedRow(row, columns, paper, used) {
  const held = paper?.rows[settingOf(row.row)]?.[row.row[0]];
  if (!held) return [];
  const [method, cells] = held;
  const made = columns.map((column) => {
    if (!cells[column.name]) return element("td", {}, "–");
    const [figure, letters] = cells[column.name];
    const keys = letters ? letters.split(",") : [];
    keys.forEach((key) => used.add(key));
    const apart = keys.some((key) => paper.footnotes[key].startsWith("NOT COMPARABLE"));
    return element("td", {}, element("span", { class: apart ? "incomparable" : null }, figure), keys.length ? element("sup", {}, ` ${letters}`) : null);
  });
  return [element("tr", { class: "published" }, element("th", { scope: "row" }, `${paper.name}: ${method}`),
    ...made, element("td", {}, ""))];
}

// The best mean of each column and setting, unless more than half of the rows share it: nothing stands out then.
function bestOf(rows, columns) {
  const best = new Map();
  for (const column of columns) {
    for (const [setting, group] of groupBy(rows.filter((row) => row.cells[column.name]?.mean !== undefined), (row) => settingOf(row.row))) {
      const means = group.map((row) => row.cells[column.name].mean);
      const most = Math.max(...means);
      if (2 * means.filter((mean) => mean === most).length <= means.length) best.set(column.name + setting, most);
    }
  }
  return best;
}

function accuracyTable(rows, columns, paper, sort, onSort, open) {
  const best = bestOf(rows, columns);
  const used = new Set();
  const shown = rows.map((row) => ({ ...row, original: row, below: publishedRow(row, columns, paper, used) }));
  const majority = (column) => (column.majority.length ? `majority class ${column.majority.map((value) => fixed(value)).join(" to ")}` : "");
  const made = [
    { title: "Attention", key: (row) => row.row.join("\u0000"), cell: (row) => element("th", { scope: "row" }, row.row[0], element("small", { title: settingOf(row.row) }, shortSetting(row.row))) },
    ...columns.map((column) => ({
      title: column.name, note: majority(column), key: (row) => row.cells[column.name]?.mean ?? null,
      cell: (row) => accuracyCell(row.original, column, best, open),
    })),
    { title: "Average", note: "of the columns shown", key: (row) => averageOf(row, columns),
      cell: (row) => element("td", {}, averageOf(row, columns) === null ? "–" : fixed(averageOf(row, columns))) },
  ];
  const notes = [...used].sort((a, b) => a.length - b.length || a.localeCompare(b)).map((key) => element("p", {}, element("strong", {}, key), ` ${paper.footnotes[key]}.`));
  if (paper) {
    const lead = used.size || shown.some((row) => row.below.length)
      ? `Rows in italics are published figures of ${paper.title}, not measured here. Crossed out: not comparable with the row above, for the reason in its note.`
      : `${paper.title} publishes no figure for the attentions and tasks shown.`;
    notes.unshift(element("p", {}, lead));
  }
  if (columns.some((column) => column.standIn)) notes.push(element("p", {}, "A stand-in is real data that is not the benchmark's own: never compare it with published figures."));
  return { table: sortableTable(made, shown, sort, onSort, "Test accuracy in percent, attentions by task"), notes };
}

// ---- paired comparisons --------------------------------------------------------------------------------------------

function pairsTable(rows, sort, onSort) {
  const text = (title, of) => ({ title, text: true, key: of, cell: (row) => element("td", { class: "text" }, of(row)) });
  return sortableTable([
    { title: "Attention", key: (row) => row.attention, cell: (row) => element("th", { scope: "row" }, row.attention) },
    text("against", (row) => row.reference),
    { title: "on", text: true, key: (row) => row.column, cell: (row) => element("td", { class: "text wrap" }, row.column) },
    { title: "Difference", key: (row) => row.difference, cell: (row) => element("td", {}, `${row.difference > 0 ? "+" : ""}${fixed(row.difference)}`, element("small", {}, `${fixed(row.low)} to ${fixed(row.high)}`)) },
    { title: "Only it right", key: (row) => row.onlyA, cell: (row) => element("td", {}, `${row.onlyA}`, element("small", {}, `only the other ${row.onlyB}`)) },
    { title: "Seeds", key: (row) => row.seeds.length, cell: (row) => element("td", { title: row.seeds.join(", ") }, `${row.seeds.length}`) },
    { title: "p", key: (row) => row.p, cell: (row) => element("td", { title: row.method }, probability(row.p)) },
    { title: "p (Holm)", key: (row) => row.holm, cell: (row) => element("td", {}, row.holm < 0.05 ? element("strong", {}, probability(row.holm)) : probability(row.holm)) },
    { title: "Test", text: true, key: (row) => row.method, cell: (row) => element("td", { class: "text", title: row.method }, row.method.split(/[ ,]/)[0]) },
  ], rows, sort, onSort, "Paired comparisons with the reference attention");
}

// ---- runs ----------------------------------------------------------------------------------------------------------

function runsTable(runs, sort, onSort, actions, limit) {
  const number = (title, of, show) => ({ title, key: (run) => of(run) ?? null, cell: (run) => element("td", {}, of(run) === undefined ? "–" : show(of(run))) });
  const text = (title, of) => ({ title, text: true, key: of, cell: (run) => element("td", { class: "text" }, of(run)) });
  const act = (label, words, action) => element("button", { type: "button", "aria-label": words, onclick: action }, label);
  return sortableTable([
    { title: "Run", key: (run) => run.id, cell: (run) => element("th", { scope: "row" }, element("button", { class: "cell", type: "button", onclick: () => actions.open(run) }, element("code", {}, run.id))) },
    { title: "Compare", text: true, key: () => 0, cell: (run) => element("td", { class: "text" }, act("A", `make ${run.id} run A`, () => actions.pick("a", run)), " ", act("B", `make ${run.id} run B`, () => actions.pick("b", run))) },
    { title: "Task and data", text: true, key: (run) => run.column, cell: (run) => element("td", { class: "text wrap" }, run.column) },
    text("Attention", (run) => run.row[0]),
    number("Seed", (run) => run.seed, String),
    { title: "Protocol", text: true, key: (run) => settingOf(run.row), cell: (run) => element("td", { class: "text", title: settingOf(run.row) }, shortSetting(run.row)) },
    text("Status", (run) => run.status),
    number("Accuracy", (run) => run.accuracy, (value) => fixed(value, 2)),
    number("Train ex/s", (run) => run.speed, grouped),
    number("Step MiB", (run) => run.memory, grouped),
    text("Hardware", (run) => run.hardware),
  ], runs, sort, onSort, "All runs", limit);
}

function provenance(dialog, title, runs, actions) {
  const close = element("button", { class: "close", type: "button", onclick: () => dialog.close() }, "Close");
  dialog.replaceChildren(close, element("h3", { id: "provenance-title" }, title), ...runs.map((run) => runDetails(run, actions)));
  dialog.showModal();
}

function runDetails(run, actions) {
  const facts = {
    status: run.error ? `${run.status}: ${run.error}` : run.status,
    accuracy: run.accuracy === undefined ? null : `${fixed(run.accuracy, 2)} % (${run.correct} of ${run.total}) at the best validation; ${fixed(run.final, 2)} % after the last step`,
    "training": run.speed === undefined ? null : `${grouped(run.speed)} examples per second, ${grouped(run.memory)} MiB per step, ${run.steps} steps`,
    hardware: run.hardware, commit: run.commit, started: run.started, experiment: run.experiment || "none",
    record: run.path, "test data, SHA-256": run.test, settings: settingOf(run.row),
  };
  const list = element("dl", {}, ...Object.entries(facts).filter(([, value]) => value).flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, value)]));
  const copy = element("button", { type: "button", onclick: () => navigator.clipboard?.writeText(run.command).then(() => { copy.textContent = "Copied"; }) }, "Copy");
  const buttons = element("p", {}, ...(run.validation ? [element("button", { type: "button", onclick: () => actions.curve(run) }, "Show its learning curve"), " "] : []),
    element("button", { type: "button", onclick: () => actions.pick("a", run) }, "Compare as A"), " ", element("button", { type: "button", onclick: () => actions.pick("b", run) }, "Compare as B"));
  return element("div", { class: "run" }, element("strong", {}, `seed ${run.seed}, run `), element("code", {}, run.id), list,
    element("div", {}, "Run it again: ", copy, element("pre", {}, element("code", {}, run.command))), buttons);
}

// ---- what differs --------------------------------------------------------------------------------------------------

function configurationOf(run, parts) {
  const whole = { experiment: run.experiment, hardware: run.hardware, commit: run.commit, "test data, SHA-256": run.test };
  for (const [part, place] of Object.entries(run.config)) Object.assign(whole, parts[part][place]);
  return whole;
}

function differenceTable(a, b, parts) {
  const [left, right] = [configurationOf(a, parts), configurationOf(b, parts)];
  const show = (value) => (value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  const keys = [...new Set([...Object.keys(left), ...Object.keys(right)])].sort().filter((key) => show(left[key]) !== show(right[key]));
  const figures = ["accuracy", "speed", "memory"].filter((key) => a[key] !== undefined && b[key] !== undefined);
  const line = (name, x, y) => element("tr", {}, element("th", { scope: "row" }, name), element("td", { class: "text wrap" }, x), element("td", { class: "text wrap" }, y));
  const names = { accuracy: "accuracy, %", speed: "training examples per second", memory: "peak memory of a step, MiB" };
  const body = [...figures.map((key) => line(names[key], grouped2(a[key]), grouped2(b[key]))), ...keys.map((key) => line(key, show(left[key]), show(right[key])))];
  const words = keys.length ? `${keys.length} settings differ.` : "Nothing in their configuration differs.";
  const head = element("tr", {}, ...["setting", `A: ${a.id}`, `B: ${b.id}`].map((title, place) => element("th", { scope: "col", class: place ? "text" : null }, title)));
  return [element("p", {}, words), element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Differences" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)))];
}

const grouped2 = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 2 });
