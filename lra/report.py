"""Owns the rendered form of a ledger: tables as Markdown, LaTeX and CSV, the figure as PNG and PDF."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from lra.display import say
from lra.figures import accuracy_against_throughput, save_figure
from lra.identity import identity_of, run_id_of
from lra.ledger import Ledger, write_atomically
from lra.records import RunRecord
from lra.tables import Layout, Table, accuracy_table, efficiency_table, layout_of, tidy


def report(config: DictConfig) -> None:
    """The job: `experiment=<name>` renders the cells of that grid, without it every record of the ledger."""
    from lra.grid import grid_of

    cells = None
    if config.experiment:
        hydra = HydraConfig.get()
        cells = grid_of(hydra.sweeper.params, list(hydra.overrides.task))
    render(config, cells)


def render(config: DictConfig, cells: list[list[str]] | None) -> list[Path]:
    """Write the files, print the accuracy and the efficiency table."""
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
    for protocol in dict.fromkeys(record.protocol for record in records):
        chosen = [record for record in records if record.protocol == protocol]
        layout = layout_of(chosen, attentions, tasks)
        suffix = "" if len({record.protocol for record in records}) == 1 else f"_{protocol}"
        written += _render_one(chosen, layout, f"{name}, protocol {protocol}", folder, suffix, config)
    _track(config, records, str(name), written)
    say(f"written to {folder}: " + ", ".join(path.name for path in written))
    return written


def _of_grid(records: Sequence[RunRecord], cells: list[list[str]]) -> tuple[list[RunRecord], list[str], list[str]]:
    from lra.grid import compose_cell

    by_id = {record.run_id: record for record in records}
    found, attentions, tasks = [], {}, {}
    for cell in cells:
        config = compose_cell(cell)
        attentions[config.names.attention] = tasks[config.names.task] = None
        record = by_id.get(run_id_of(identity_of(config)))
        if record is not None:
            found.append(record)
    return found, list(attentions), list(tasks)


def _render_one(
    records: list[RunRecord], layout: Layout, title: str, folder: Path, suffix: str, config: DictConfig
) -> list[Path]:
    frame = tidy(records)
    decimals = config.report.decimals
    tables = {
        "accuracy": accuracy_table(frame, layout, f"Test accuracy in percent ({title})", decimals),
        "efficiency": efficiency_table(frame, layout, f"Training throughput and memory ({title})"),
    }
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
