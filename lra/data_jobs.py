"""Owns the survey of the data: per task and source what is here, what is missing and how to get it; and preparation."""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data.base import SPLITS, DataError, Task
from data.encoded import read_manifest
from lra.display import say
from lra.grid import compose_cell
from lra.ledger import write_atomically

READY = "ready"  # encoded, and served as it is
ON_USE = "on first use"  # generated, read or fetched by preparation
MISSING = "missing"
_QUICK_ONLY = "embedded"  # sources that hold what the quick protocol needs and no more


@dataclass(frozen=True)
class Source:
    """One source of one task, as the configuration asks for it."""

    task: str
    source: str
    protocol: str  # whose sizes
    state: str
    where: Path  # the encoded entry, or the first thing that is missing
    dataset: str = ""
    stand_in: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    how_to_get: str = ""


def data(config: DictConfig) -> None:
    """The job: a table of all sources, or with `job.prepare=true` one of them made ready."""
    if config.job.prepare:
        prepare(config)
        return
    found = [look(asked) for asked in tasks_asked_for()]
    folder = Path(config.paths.runs) / "data"
    write_atomically(
        folder / "sources.json", json.dumps([asdict(item) for item in found], indent=1, default=str).encode()
    )
    write_atomically(folder / "sources.csv", _flat(found).to_csv(index=False).encode())
    console = Console()
    if not console.is_terminal:
        console = Console(width=config.job.width)
    console.print(_table(found, Path(config.paths.datasets)))
    for line in _advice(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    sys.stdout.flush()
    say(f"whole checksums: {folder / 'sources.csv'} and sources.json")


def prepare(config: DictConfig) -> None:
    """The task that the configuration names, made ready; its manifest goes to stdout."""
    if not any(item.startswith("task=") for item in HydraConfig.get().overrides.task):
        raise ValueError(
            "job.prepare=true needs task=<name>, for example: run.py job=data job.prepare=true task=listops"
        )
    task: Task = instantiate(config.task)
    say(f"{config.names.task} from {task.source}, into {task.datasets}")
    started = perf_counter()
    manifest = task.prepare()
    seconds = perf_counter() - started
    json.dump(manifest.as_dict(), sys.stdout, indent=1, default=str)
    print()
    entry = next((entry for entry in task.entries() if entry.is_dir()), task.datasets)
    say(f"{manifest.dataset}: ready in {seconds:.1f} s, {_bytes_in(entry) / 1e6:,.1f} MB in {entry}")


def release(config: DictConfig) -> None:
    """The job that brings the released archive, which the sources named `official` read."""
    say(f"ready in {instantiate(config.job.release).bring()}; use it with task.source=official")


@dataclass(frozen=True)
class Asked:
    """A task and source that was asked for, built but not prepared, with the configuration that it came from."""

    task: Task
    name: str
    source: str
    config: DictConfig


def tasks_asked_for() -> Iterator[Asked]:
    """Every task and source, or those that were typed. What else was typed holds for each."""
    typed = list(HydraConfig.get().overrides.task)
    given = dict(item.split("=", 1) for item in typed if "=" in item)
    others = [item for item in typed if item.split("=")[0] not in ("task", "task.source")]
    for name in [given["task"]] if "task" in given else _task_names():
        complete = compose_cell([*others, f"task={name}"])
        module = sys.modules[get_class(complete.task._target_).__module__]
        for source in [given["task.source"]] if "task.source" in given else module.SOURCES:
            config = copy.deepcopy(complete)
            if source == _QUICK_ONLY and "protocol" not in given:
                config = compose_cell([*others, "protocol=quick", f"task={name}"])
            config.task.source = source
            yield Asked(instantiate(config.task), name, source, config)


def look(asked: Asked) -> Source:
    """Reads manifests and sizes, and no data: well under a second."""
    task, entries = asked.task, asked.task.entries()
    names: dict[str, Any] = {"task": asked.name, "source": asked.source, "protocol": asked.config.names.protocol}
    for entry in entries:
        try:
            found = read_manifest(entry)
        except (OSError, ValueError, KeyError) as error:
            how = f"its manifest cannot be read ({error}); preparation makes it again"
            return Source(**names, state=ON_USE, where=entry, how_to_get=how)
        if found is not None:
            manifest, _ = found
            facts = {key: manifest[key] for key in ("dataset", "stand_in", "counts", "sha256")}
            return Source(**names, state=READY, where=entry, bytes=_bytes_in(entry), **facts)
    missing = task.check()
    if missing:
        state = ON_USE if all(item.fetchable for item in missing) else MISSING
        what = ", ".join(item.what for item in missing)
        return Source(**names, state=state, where=missing[0].expected_at, how_to_get=f"{what}: {missing[0].how_to_get}")
    if not entries:
        raise DataError(f"{asked.name}: source {asked.source} misses nothing, and has no place for what it encodes")
    return Source(**names, state=ON_USE, where=entries[0], how_to_get="make data TASK=<task> SOURCE=<source>")


def _task_names() -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    return loader.get_group_options("task", ObjectType.CONFIG)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _flat(found: list[Source]) -> pd.DataFrame:
    rows = []
    for item in found:
        row = asdict(item)
        for key in ("counts", "sha256"):
            values = row.pop(key)
            row |= {f"{key}_{split}": values.get(split) for split in SPLITS}
        rows.append(row)
    return pd.DataFrame(rows)


def _table(found: list[Source], datasets: Path) -> Table:
    table = Table(title=f"Data below {datasets} (* stand-in)", title_justify="left", title_style="", box=SIMPLE_HEAD)
    for column in ("task", "source", "data set", "state"):
        table.add_column(column, no_wrap=True)
    for column in (*SPLITS, "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("SHA-256 of train / val / test", no_wrap=True)
    table.add_column("where, or where expected", overflow="fold", min_width=30)
    colours = {READY: "green", ON_USE: "yellow", MISSING: "red"}
    for item in found:
        counts = [f"{item.counts[split]:,}" if item.counts else "-" for split in SPLITS]
        digests = " ".join(item.sha256[split][:8] for split in SPLITS) if item.sha256 else "-"
        size = f"{item.bytes / 1e6:,.1f}" if item.bytes else "-"
        where = str(item.where.relative_to(datasets)) if item.where.is_relative_to(datasets) else str(item.where)
        dataset = f"{item.dataset} *" if item.stand_in else item.dataset or "-"
        state = f"[{colours[item.state]}]{item.state}[/]"
        table.add_row(item.task, item.source, dataset, state, *counts, size, digests, where)
    return table


def _advice(found: list[Source]) -> list[str]:
    """How to get what is not ready, equal advice said once."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for item in found:
        if item.state != READY:
            grouped.setdefault((item.state, item.how_to_get), []).append(f"{item.task} {item.source}")
    return [f"  {', '.join(names)} ({state}): {how}" for (state, how), names in grouped.items()]
