"""Owns the measurement of linear floors: which data sets, in which order, and the tables that come of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from data.base import SPLITS, DataError, Manifest, Task
from lra.data_jobs import READY, look, tasks_asked_for
from lra.display import display, say
from lra.floors import FLOORS, Examples, Floor, Splits
from lra.ledger import write_atomically


@dataclass(frozen=True)
class Row:
    """One floor of one data set. `test_sha256` names the bytes that it was measured on."""

    task: str
    dataset: str
    source: str
    stand_in: bool
    max_len: int
    train: int
    val: int
    test: int
    floor: str
    val_accuracy: float
    test_accuracy: float
    seconds: float
    test_sha256: str


def baselines(config: DictConfig) -> None:
    """The job. One CSV per data set; the Markdown table is made of all of them."""
    folder = Path(config.paths.runs) / "baselines"
    chosen = list(tasks_asked_for())
    several = len(chosen) > 1
    measured = 0
    for asked in chosen:
        if asked.task.name not in FLOORS:
            if several:
                continue
            raise ValueError(f"no floors are defined for task {asked.name}; they are for {', '.join(FLOORS)}")
        if not several or look(asked).state == READY:
            _measure(asked.task, config, folder)
            measured += 1
    if not measured:
        raise DataError("no data set is ready: see `make data`, prepare one, or name one by task= and task.source=")
    frame = read_floors(folder)
    write_atomically(folder / "floors.md", markdown(frame).encode())
    print(markdown(frame))
    say(f"written to {folder}: floors.md and one CSV per data set")


def read_floors(folder: Path) -> pd.DataFrame:
    """All floors measured so far; empty when there are none."""
    frames = [pd.read_csv(path) for path in sorted(folder.glob("*.csv"))]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(Row.__annotations__))


def _measure(task: Task, config: DictConfig, folder: Path) -> None:
    manifest = task.prepare()
    floors = _chosen(FLOORS[task.name], config.job.only)
    splits = Splits(**{split: _examples(task, split, config.job.max_examples) for split in SPLITS})
    stem = f"{manifest.dataset}-{manifest.source}-{task.max_len}"
    path = folder / (f"{stem}.csv" if config.job.max_examples is None else f"{stem}-first{config.job.max_examples}.csv")
    rows = _known(path, manifest)
    with display.run(f"floors of {manifest.dataset}", len(floors)) as bar:
        for done, (name, floor) in enumerate(floors.items()):
            bar.update(done, name)
            started = perf_counter()
            val, test = floor(splits)
            rows[name] = _row(task, manifest, splits, name, val, test, perf_counter() - started)
            ordered = [rows[known] for known in FLOORS[task.name] if known in rows]
            frame = pd.DataFrame([asdict(row) for row in ordered])  # written each time: a long list may be interrupted
            write_atomically(path, frame.to_csv(index=False).encode())
            say(f"{manifest.dataset}: {name}: test {test:.4f} ({rows[name].seconds:.1f} s)")
        bar.update(len(floors))


def _known(path: Path, manifest: Manifest) -> dict[str, Row]:
    """What an earlier call measured on the same bytes."""
    rows = pd.read_csv(path).to_dict("records") if path.is_file() else []
    return {row["floor"]: Row(**row) for row in rows if row["test_sha256"] == manifest.sha256["test"]}


def _row(task: Task, manifest: Manifest, splits: Splits, name: str, val: float, test: float, seconds: float) -> Row:
    return Row(
        task=task.name,
        dataset=manifest.dataset,
        source=manifest.source,
        stand_in=manifest.stand_in,
        max_len=task.max_len,
        train=len(splits.train.rows),
        val=len(splits.val.rows),
        test=len(splits.test.rows),
        floor=name,
        val_accuracy=round(val, 5),
        test_accuracy=round(test, 5),
        seconds=round(seconds, 1),
        test_sha256=manifest.sha256["test"],
    )


def _chosen(floors: Mapping[str, Floor], only: Sequence[str] | None) -> dict[str, Floor]:
    if only is None:
        return dict(floors)
    for name in only:
        if name not in floors:
            raise ValueError(f"job.only: {name!r} is no floor of this task; choose from {', '.join(map(repr, floors))}")
    return {name: floors[name] for name in only}


def _examples(task: Task, split: str, most: int | None) -> Examples:
    data = task.split(split)
    rows = np.arange(len(data) if most is None else min(most, len(data)))
    return Examples(data, rows, lambda ids: task.describe(ids)["text"])


def markdown(frame: pd.DataFrame) -> str:
    """One table per data set."""
    parts = ["# Linear floors", ""]
    for (dataset, max_len), rows in frame.groupby(["dataset", "max_len"], sort=False):
        first = rows.iloc[0]
        note = " (stand-in)" if first["stand_in"] else ""
        sizes = f"{first['train']:,} / {first['val']:,} / {first['test']:,} examples, source {first['source']}"
        parts += [f"## {dataset}{note}", "", f"{sizes}, max_len {max_len}", ""]
        parts += ["| floor | val | test | seconds |", "|---|--:|--:|--:|"]
        for row in rows.itertuples():
            parts.append(f"| {row.floor} | {row.val_accuracy:.3f} | {row.test_accuracy:.3f} | {row.seconds:.1f} |")
        parts.append("")
    return "\n".join(parts)
