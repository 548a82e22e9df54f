"""Owns the tables: records in, data frames of finished cells out. Reads nothing but records."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lra.records import RunRecord
from lra.tracking import hardware_name

MISSING = "–"
# tables list tasks in the benchmark's order
TASK_ORDER = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")


_TEX = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "·": r"$\cdot$", MISSING: "--"}


@dataclass(frozen=True)
class Table:
    """A rendered table: `cells` holds text, `notes` what a reader must know to read the cells rightly."""

    title: str
    cells: pd.DataFrame
    notes: tuple[str, ...]

    def markdown(self) -> str:
        body = self.cells.to_markdown(disable_numparse=True)
        return f"### {self.title}\n\n{body}\n\n" + "".join(f"- {note}\n" for note in self.notes)

    def latex(self) -> str:
        columns = "l" + "r" * len(self.cells.columns)
        escaped = self.cells.rename(index=_tex, columns=_tex).map(_tex)
        body = escaped.to_latex(column_format=columns, escape=False)
        notes = "".join(f"% {note}\n" for note in self.notes)
        return f"% {self.title}\n{notes}{body}"

    def csv(self) -> str:
        return self.cells.to_csv()


@dataclass(frozen=True)
class Layout:
    """Which rows and columns a table has, whether or not a record fills them."""

    attentions: Sequence[str]
    datasets: Sequence[str]


def tidy(records: Sequence[RunRecord]) -> pd.DataFrame:
    """One row per record, numbers as numbers."""
    rows = []
    for record in records:
        row = {
            "run_id": record.run_id, "task": record.task, "dataset": record.dataset, "attention": record.label,
            "protocol": record.protocol, "seed": record.seed, "precision": record.identity["precision"],
            "status": record.status, "commit": record.provenance.get("commit"), "hardware": hardware_name(record),
        }  # fmt: skip
        if record.status == "finished":
            best, cost = record.result["test_best"], record.efficiency
            row |= {
                "accuracy": best["accuracy"], "accuracy_final": record.result["test_final"]["accuracy"],
                "correct": best["correct"], "total": best["total"], "majority": record.result["majority_accuracy"],
                "val_accuracy": record.result["val_best_accuracy"], "steps": record.result["steps"],
                "parameters": cost["parameters"], "attention_parameters": cost["attention_parameters"],
                "length": cost["length"], "batch_size": cost["batch_size"],
                "train_examples_per_second": cost["train_step"]["examples_per_second"],
                "train_steps_per_second": cost["train_step"]["steps_per_second"],
                "train_peak_memory_bytes": cost["train_step"]["peak_memory_bytes"],
                "inference_examples_per_second": cost["inference"]["examples_per_second"],
                "inference_peak_memory_bytes": cost["inference"]["peak_memory_bytes"],
                "fit_seconds": record.provenance["seconds"]["fit"],
                "keeps_freed_memory": bool(record.provenance.get("keeps_freed_memory")),
            }  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def settings_of(record: RunRecord) -> str:
    """What was overridden beyond the attention and the model: runs that differ in it never share a mean."""
    changing = ("task.", "per_task.", "protocol.")
    return ", ".join(sorted(item for item in record.overrides if item.lstrip("+~").startswith(changing)))


def layout_of(records: Sequence[RunRecord], attentions: Sequence[str] = (), tasks: Sequence[str] = ()) -> Layout:
    """The stated attentions and tasks first, in their order; what the records hold beyond them after that."""
    by_task: dict[str, list[str]] = {}
    for record in records:
        names = by_task.setdefault(record.task, [])
        if record.data and record.dataset not in names:
            names.append(record.dataset)
    order = [*(task for task in TASK_ORDER if task in tasks or task in by_task)]
    order += [task for task in (*tasks, *by_task) if task not in order]
    datasets = [name for task in dict.fromkeys(order) for name in (by_task.get(task) or [task])]
    labels = list(dict.fromkeys([*attentions, *(record.label for record in records)]))
    known = {record.label for record in records}
    overridden = {record.attention for record in records if record.label != record.attention}
    return Layout([name for name in labels if name in known or name not in overridden], datasets)


def accuracy_table(frame: pd.DataFrame, layout: Layout, title: str, decimals: int) -> Table:
    """Test accuracy in percent at the best validation step: mean and, from two seeds on, standard deviation."""
    cells = pd.DataFrame(index=pd.Index(layout.attentions, name="attention"), columns=layout.datasets, dtype=object)
    means = pd.DataFrame(index=cells.index, columns=cells.columns, dtype=float)
    for attention in layout.attentions:
        for dataset in layout.datasets:
            group = _group(frame, attention, dataset)
            done = group[group["status"] == "finished"] if len(group) else group
            cells.loc[attention, dataset] = _accuracy_cell(group, done, decimals)
            if len(done):
                means.loc[attention, dataset] = 100 * done["accuracy"].mean()
    if len(layout.datasets) > 1:
        average = means.mean(axis=1, skipna=False)
        cells["average"] = [MISSING if pd.isna(value) else f"{value:.{decimals}f}" for value in average]
    done = _finished(frame)
    if len(done):
        majority = done.groupby("dataset")["majority"].first()
        floor = [f"{100 * majority[name]:.{decimals}f}" if name in majority else MISSING for name in layout.datasets]
        cells.loc["(majority class)"] = [*floor, *([""] if "average" in cells else [])]
    return Table(title, cells, _notes(frame))


def efficiency_table(frame: pd.DataFrame, layout: Layout, title: str) -> Table:
    """Training throughput (examples/s) and peak memory of a step (MiB), each task's cells as `examples/s · MiB`."""
    cells = pd.DataFrame(index=pd.Index(layout.attentions, name="attention"), columns=layout.datasets, dtype=object)
    for attention in layout.attentions:
        for dataset in layout.datasets:
            done = _finished(_group(frame, attention, dataset))
            cells.loc[attention, dataset] = MISSING
            if len(done):
                speed = done["train_examples_per_second"].median()
                memory = done["train_peak_memory_bytes"].median() / 2**20
                cells.loc[attention, dataset] = f"{speed:,.0f} · {memory:,.0f}"
    done = _finished(frame)
    shapes = [
        f"{name}: batch {int(group['batch_size'].iloc[0])} x length {int(group['length'].iloc[0])}"
        for name, group in (done.groupby("dataset", sort=False) if len(done) else ())
    ]
    notes = (
        "Training examples per second · peak memory of one training step in MiB beyond weights and optimiser; "
        "full-length inputs without padding, median of repeated synchronised steps.",
        *shapes,
        *_mixture(done),
        *_notes(frame),
    )
    return Table(title, cells, notes)


def _group(frame: pd.DataFrame, attention: str, dataset: str) -> pd.DataFrame:
    if not len(frame):
        return frame
    # a run that failed before its data was known is filed under the task's plain name
    task = dataset.split(" (stand-in")[0]
    same_data = (frame["dataset"] == dataset) | ((frame["task"] == task) & (frame["status"] != "finished"))
    return frame[(frame["attention"] == attention) & same_data]


def _finished(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["status"] == "finished"] if len(frame) else frame


def _accuracy_cell(group: pd.DataFrame, done: pd.DataFrame, decimals: int) -> str:
    if not len(group):
        return MISSING
    if not len(done):
        return "/".join(sorted(set(group["status"]))).replace("oom", "OOM")
    text = f"{100 * done['accuracy'].mean():.{decimals}f}"
    if len(done) > 1:
        text += f" ± {100 * done['accuracy'].std(ddof=1):.{decimals}f}"
    lost = len(group) - len(done)
    return text + (f" ({lost} of {len(group)} did not finish)" if lost else "")


def _notes(frame: pd.DataFrame) -> tuple[str, ...]:
    done = _finished(frame)
    if not len(done):
        return ("No finished run.",)
    notes = [_seeds(done)]
    if done["dataset"].str.contains("stand-in").any():
        notes.append(
            "A stand-in is real data that is not the benchmark's own: never compare it with published figures."
        )
    notes.append("Hardware: " + "; ".join(sorted(set(done["hardware"]))) + ".")
    commits = {str(value)[:12] + ("+changes" if "+" in str(value) else "") for value in done["commit"]}
    notes.append("Commit: " + ", ".join(sorted(commits)) + ".")
    return tuple(notes)


def _mixture(done: pd.DataFrame) -> list[str]:
    """A warning where runs of before and after `lra.allocator` served them stand in one table."""
    if not len(done) or done["keeps_freed_memory"].nunique() == 1:
        return []
    loose = done[~done["keeps_freed_memory"]]
    return [
        f"{len(loose)} of {len(done)} runs gave freed memory back after each step (earlier commits did), which costs some "
        f"throughput on a CPU: {', '.join(dict.fromkeys(loose['dataset']))}."
    ]


def _seeds(done: pd.DataFrame) -> str:
    """Which seeds the cells hold; cells of a grid that has only begun may differ."""
    cells = done.groupby(["dataset", "attention"], sort=False)["seed"].agg(lambda seeds: ", ".join(_ordered(seeds)))
    by_dataset = {dataset: list(held.unique()) for dataset, held in cells.groupby("dataset", sort=False)}
    if cells.nunique() == 1:
        return f"Seeds: {cells.iloc[0]}." + ("" if "," in cells.iloc[0] else " One seed: no spread can be given.")
    if all(len(held) == 1 for held in by_dataset.values()):
        listed = "; ".join(f"{dataset}: {held[0]}" for dataset, held in by_dataset.items())
        return f"Seeds: {listed}. One seed shows no spread."
    return f"Seeds: {', '.join(_ordered(done['seed']))}, but not all in every cell; a cell without ± holds one."


def _ordered(seeds: pd.Series) -> list[str]:
    return [str(seed) for seed in sorted(set(seeds))]


def _tex(text: str) -> str:
    text = str(text)
    for plain, escaped in _TEX.items():
        text = text.replace(plain, escaped)
    return text
