"""Owns the papers' figures: read from results/published/, checked, and set beside ours with what makes them differ."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from omegaconf import OmegaConf

from lra.records import RunRecord
from lra.tables import MISSING, Table

FOLDER = Path(__file__).resolve().parents[1] / "results" / "published"
COLUMNS = ("paper", "table", "method", "task", "metric", "value", "std", "unit", "source")
Kind = Literal["accuracy", "cost"]

_UNITS = {
    "accuracy": "percent", "accuracy_approx": "percent", "accuracy_at_epoch_10": "percent",
    "accuracy_at_epoch_20": "percent", "test_accuracy": "percent", "train_accuracy": "percent",
    "peak_memory": ("GB", "MB"), "peak_memory_per_device": "GB", "train_speed": "steps/s", "train_time": "hour",
    "time_per_epoch_A100": "minute", "time_per_epoch_T4": "minute", "est_flops": "GFLOP",
    "instability_ratio_vs_self_attention": "ratio",
}  # fmt: skip
_NAMES = {
    "ListOps": "listops", "Text": "text", "Retrieval": "retrieval", "Image": "image", "Pathfinder": "pathfinder",
    "Path-X": "pathx", "Avg": "average",
}  # fmt: skip
# overrides with these beginnings make another benchmark of it, unless they name a published quirk
_CHANGING = ("protocol.", "task.")
_QUIRKS = (
    "task.brackets", "task.validation", "task.pixel_zero_is_pad", "task.source", "protocol.validation_batches",
    "protocol.best_after_fraction", "protocol.cycle_momentum",
)  # fmt: skip


@dataclass(frozen=True)
class Note:
    """A difference of protocol. Empty `tasks`: all of them. `unless`: (key of our configuration, value)."""

    text: str
    of: Kind
    tasks: tuple[str, ...]
    unless: tuple[str, Any] | None


@dataclass(frozen=True)
class Paper:
    """`figures`: the rows of published_lra.csv that are this paper's; `attentions`: its method names in our terms."""

    key: str
    name: str
    title: str
    protocol: str | None
    notes: tuple[Note, ...]
    figures: pd.DataFrame
    attentions: Mapping[str, str]


@dataclass
class Beside:
    """Published rows for one table: {attention: (method, {column: (text, letters)})}, and the footnotes by letter."""

    paper: Paper
    rows: dict[str, tuple[str, dict[str, tuple[str, str]]]] = field(default_factory=dict)
    footnotes: dict[str, str] = field(default_factory=dict)  # text -> letter


@cache
def load_figures(path: Path = FOLDER / "published_lra.csv") -> pd.DataFrame:
    """All published figures; ValueError names the file and the line that breaks the schema."""
    frame = pd.read_csv(path)
    if tuple(frame.columns) != COLUMNS:
        raise ValueError(f"{path}: columns {list(frame.columns)}; expected {list(COLUMNS)}")
    for place, row in enumerate(frame.to_dict("records")):
        problem = _problem(row)
        if problem:
            raise ValueError(f"{path}, line {place + 2}: {problem}")
    twice = frame.duplicated(["paper", "table", "method", "task", "metric"])
    if twice.any():
        raise ValueError(f"{path}, line {int(twice.idxmax()) + 2}: this figure stands in the file twice")
    return frame


def _problem(row: Mapping[str, Any]) -> str:
    known = _UNITS.get(row["metric"])
    if known is None:
        return f"unknown metric {row['metric']!r}; choose of {', '.join(sorted(_UNITS))}"
    if row["unit"] not in (known if isinstance(known, tuple) else (known,)):
        return f"{row['metric']} in {row['unit']!r}; expected {known!r}"
    if row["unit"] == "percent" and not pd.isna(row["value"]) and not 0 <= row["value"] <= 100:
        return f"{row['value']} is no percentage"
    if any(pd.isna(row[key]) for key in ("paper", "table", "method", "task", "source")):
        return "paper, table, method, task and source may not be empty"
    return ""


def paper_keys() -> list[str]:
    return [str(key) for key in OmegaConf.load(FOLDER / "papers.yaml")]


@cache
def load_paper(key: str) -> Paper:
    papers = OmegaConf.to_container(OmegaConf.load(FOLDER / "papers.yaml"))
    assert isinstance(papers, dict)
    if key not in papers:
        raise ValueError(f"report.published={key!r} is not a paper in {FOLDER}; choose one of {', '.join(papers)}")
    stated = papers[key]
    notes = tuple(
        Note(
            " ".join(note["text"].split()),
            note["of"],
            tuple(note.get("tasks", ())),
            (note["unless"]["key"], note["unless"]["value"]) if "unless" in note else None,
        )
        for note in stated["notes"]
    )
    figures = load_figures()
    methods = pd.read_csv(FOLDER / "methods.csv")
    mine = methods[methods["paper"] == key]
    return Paper(
        key, stated["name"], stated["paper"], stated["protocol"], notes,
        figures[figures["paper"] == stated["paper"]], dict(zip(mine["method"], mine["attention"], strict=True)),
    )  # fmt: skip


def beside(
    paper: Paper,
    kind: Kind,
    attentions: Sequence[str],
    columns: Mapping[str, tuple[str, Sequence[RunRecord]]],
    footnotes: dict[str, str] | None = None,
) -> Beside:
    """The paper's figures for our attentions and columns. `columns`: {name: (task, our records in it)}.
    `footnotes`, where given, is gone on with, so that several tables can share their letters."""
    found = Beside(paper, footnotes={} if footnotes is None else footnotes)
    for method, attention in paper.attentions.items():
        if attention not in attentions or attention in found.rows:
            continue
        figures = paper.figures[paper.figures["method"] == method]
        cells = {}
        for column, (task, records) in columns.items():
            text = _figure(figures, task, kind)
            if text != MISSING:
                own = [record for record in records if record.label == attention] or records
                letters = {_letter(found.footnotes, note) for note in differences(paper, kind, task, own)}
                cells[column] = (text, ",".join(sorted(letters, key=lambda letter: (len(letter), letter))))
        if cells:
            found.rows[attention] = (method, cells)
    return found


def differences(paper: Paper, kind: Kind, task: str, records: Sequence[RunRecord]) -> list[str]:
    """Why this paper's figure for this task is not the same measurement as ours."""
    texts = []
    stand_ins = sorted({record.data["dataset"] for record in records if record.data.get("stand_in")})
    if stand_ins:
        texts.append(f"NOT COMPARABLE: ours is a stand-in ({', '.join(stand_ins)}), not the benchmark's data")
    protocols = sorted({record.protocol for record in records if record.protocol != paper.protocol})
    if protocols:
        texts.append(f"NOT COMPARABLE: ours ran the protocol {', '.join(protocols)}, which is not this paper's")
    changed = list(dict.fromkeys(item for record in records for item in record.overrides if _changes(item, task)))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        texts.append(f"NOT COMPARABLE: ours was run with {', '.join(changed[:3])}{more}")
    if any(record.data.get("source") == "generated" for record in records):
        texts.append("ours is self-generated by the same recipe, not the released files")
    for note in paper.notes:
        here = note.of == kind and (not note.tasks or task in note.tasks)
        if here and not (records and note.unless and all(_has(record, *note.unless) for record in records)):
            texts.append(note.text)
    return texts


def with_published(table: Table, paper: Paper, kind: Kind, records: Sequence[RunRecord]) -> Table:
    """The table with each published row directly below ours, footnote letters in brackets behind its figures."""
    columns = {
        str(column): (str(column).split(" (stand-in")[0], [record for record in records if record.dataset == column])
        for column in table.cells.columns
    }
    plain = {name: value for name, value in columns.items() if name != "average"}
    found = beside(paper, kind, [str(name) for name in table.cells.index], plain)
    _add_average(found, list(plain), kind)
    parts = []
    for name in table.cells.index:
        parts.append(table.cells.loc[[name]])
        if name in found.rows:
            method, cells = found.rows[name]
            shown = {column: f"{text} [{letters}]" if letters else text for column, (text, letters) in cells.items()}
            label = f"{name} ({paper.name}: {method})"
            parts.append(pd.DataFrame([{c: shown.get(c, MISSING) for c in table.cells.columns}], index=[label]))
    cells = pd.concat(parts)
    cells.index.name = table.cells.index.name
    lead = f"Rows named ({paper.name}: ...) are published figures of {paper.title}, not measured here."
    if not found.rows:
        lead = f"{paper.title} publishes no figure for the attentions and tasks of this table."
    notes = [lead, *(f"[{letter}] {text}." for text, letter in found.footnotes.items())]
    return replace(table, cells=cells, notes=(*table.notes, *notes))


def _add_average(found: Beside, columns: Sequence[str], kind: Kind) -> None:
    """The paper's own average, where the table holds the same five tasks."""
    tasks = {column.split(" (stand-in")[0] for column in columns}
    if kind != "accuracy" or tasks != {"listops", "text", "retrieval", "image", "pathfinder"} or len(columns) != 5:
        return
    for method, cells in found.rows.values():
        text = _figure(found.paper.figures[found.paper.figures["method"] == method], "average", kind)
        if text != MISSING:
            letters = sorted({one for _, shown in cells.values() for one in shown.split(",") if one})
            cells["average"] = (text, ",".join(letters))


def _figure(figures: pd.DataFrame, task: str, kind: Kind) -> str:
    here = figures[figures["task"].map(_NAMES.get) == task]
    values = {row["metric"]: row for _, row in here.iterrows() if not pd.isna(row["value"])}
    if kind == "accuracy":
        row = values.get("accuracy")
        if row is None:
            return MISSING
        return f"{row['value']:g}" + ("" if pd.isna(row["std"]) else f" ± {row['std']:g}")
    parts = [values[metric] for metric in ("train_time", "peak_memory") if metric in values]
    return " · ".join(f"{row['value']:g} {'h' if row['unit'] == 'hour' else row['unit']}" for row in parts) or MISSING


def _letter(footnotes: dict[str, str], text: str) -> str:
    letters = string.ascii_lowercase
    place = len(footnotes)
    return footnotes.setdefault(text, letters[place % 26] * (place // 26 + 1))


def _changes(item: str, task: str) -> bool:
    key = item.lstrip("+~").split("=")[0]
    if key in _QUIRKS or key.endswith(".source") or key.split(".")[-1].startswith(("measure_", "log_", "checkpoint_")):
        return False
    if key.startswith("per_task."):
        return key.startswith(f"per_task.{task}.")
    return key.startswith(_CHANGING)


def _has(record: RunRecord, key: str, value: object) -> bool:
    node: Any = record.identity
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return bool(node == value)
