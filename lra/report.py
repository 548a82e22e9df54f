"""Owns the rendered form of a ledger: tables as Markdown, LaTeX and CSV, the figure as PNG and PDF."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from lra.cells import Cell, cells_of
from lra.display import say
from lra.figures import accuracy_against_throughput, save_figure
from lra.ledger import Ledger, write_atomically
from lra.published import load_paper, with_published
from lra.records import RunRecord
from lra.tables import Layout, Table, accuracy_table, efficiency_table, layout_of, settings_of, tidy


def report(config: DictConfig) -> None:
    """The job: `experiment=<name>` renders the cells of that grid, without it every record of the ledger."""
    from lra.grid import grid_of

    cells = None
    if config.experiment:
        hydra = HydraConfig.get()
        cells = cells_of(grid_of(hydra.sweeper.params, list(hydra.overrides.task)), config.paths.runs)
    render(config, cells)


def render(config: DictConfig, cells: list[Cell] | None) -> list[Path]:
    """Write the files, print the accuracy and the efficiency table."""
    if config.report.published is not None:
        load_paper(config.report.published)  # a wrong name fails here, before anything is written
    records, damaged = Ledger(config.paths.runs).read_all()
    for line in damaged:
        say(f"left out, cannot be read: {line}")
    attentions: list[str] = []
    tasks: list[str] = []
    if cells is not None:
        records, attentions, tasks = _of_grid(records, cells)
    if not records:
        say(f"no record yet in {Ledger(config.paths.runs).folder}: run something first, e.g. make reproduce")
        return []
    name = config.experiment or "all"
    folder = Path(config.paths.runs) / "report" / str(name)
    written: list[Path] = []
    groups = dict.fromkeys((record.protocol, settings_of(record)) for record in records)
    for protocol, settings in groups:
        chosen = [record for record in records if (record.protocol, settings_of(record)) == (protocol, settings)]
        layout = layout_of(chosen, attentions, tasks)
        variant = f"_{hashlib.sha256(settings.encode()).hexdigest()[:6]}" if settings else ""
        title = f"{name}, protocol {protocol}" + (", with overrides" if settings else "")
        written += _render_one(
            chosen, layout, title, folder, "" if len(groups) == 1 else f"_{protocol}{variant}", config
        )
    _track(config, records, str(name), written)
    say(f"written to {folder}: " + ", ".join(path.name for path in written))
    return written


def _of_grid(records: Sequence[RunRecord], cells: list[Cell]) -> tuple[list[RunRecord], list[str], list[str]]:
    by_id = {record.run_id: record for record in records}
    found = [by_id[cell.run_id] for cell in cells if cell.run_id in by_id]
    return (
        found,
        list(dict.fromkeys(cell.attention for cell in cells)),
        list(dict.fromkeys(cell.task for cell in cells)),
    )


def _render_one(
    records: list[RunRecord], layout: Layout, title: str, folder: Path, suffix: str, config: DictConfig
) -> list[Path]:
    frame = tidy(records)
    decimals = config.report.decimals
    tables = {
        "accuracy": accuracy_table(frame, layout, f"Test accuracy in percent ({title})", decimals),
        "efficiency": efficiency_table(frame, layout, f"Training throughput and memory ({title})"),
    }
    if config.report.published is not None:
        paper = load_paper(config.report.published)
        tables["accuracy"] = with_published(tables["accuracy"], paper, "accuracy", records)
        tables["efficiency"] = with_published(tables["efficiency"], paper, "cost", records)
    if settings := settings_of(records[0]):
        stated = f"Overrides: {settings}."
        tables = {key: replace(table, notes=(stated, *table.notes)) for key, table in tables.items()}
    written = [_write(folder / f"runs{suffix}.csv", frame.to_csv(index=False))]
    for name, table in tables.items():
        print(table.markdown())
        written += _write_table(table, folder / f"{name}{suffix}")
    if (frame["status"] == "finished").any():
        figure = accuracy_against_throughput(frame, list(layout.datasets), list(layout.attentions))
        written += save_figure(figure, folder / f"accuracy_against_throughput{suffix}")
    return written


def _write_table(table: Table, stem: Path) -> list[Path]:
    texts = {".md": table.markdown(), ".tex": table.latex(), ".csv": table.csv()}
    return [_write(stem.with_suffix(ending), text) for ending, text in texts.items()]


def _write(path: Path, text: str) -> Path:
    write_atomically(path, text.encode())
    return path


def _track(config: DictConfig, records: Sequence[RunRecord], name: str, written: Sequence[Path]) -> None:
    """The whole tables and the figure as one wandb run of job type `report`."""
    tracking: dict[str, Any] = dict(config.tracking)
    if tracking["mode"] != "disabled":
        from lra.tracking import log_report

        figures = [path for path in written if path.suffix == ".png"]
        log_report(instantiate(tracking), records, name, figures, Path(config.paths.runs))
