"""Owns the way of a finished grid into results/measured/: its records and rendered files, per hardware, to be committed."""

import re
import shutil
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lra.cells import cells_of
from lra.display import say
from lra.grid import grid_of
from lra.ledger import Ledger
from lra.report import render
from lra.tracking import hardware_name


def curate(config: DictConfig) -> None:
    """The job: `experiment=<name>` copies that grid's records to `<measured>/<hardware>/ledger`, its tables and
    figure to `<measured>/<hardware>/<name>/`.
    Raises ValueError when a cell is missing (unless `curate.incomplete`) or the records come from more than one kind of
    hardware."""
    if not config.experiment:
        raise ValueError("job=curate needs experiment=<name>: it files the records of one grid")
    hydra = HydraConfig.get()
    cells = cells_of(grid_of(hydra.sweeper.params, list(hydra.overrides.task)), config.paths.runs)
    wanted = {cell.run_id for cell in cells}
    records = [record for record in Ledger(config.paths.runs).read_all()[0] if record.run_id in wanted]
    if not isinstance(config.curate.incomplete, bool):
        raise ValueError(f"curate.incomplete={config.curate.incomplete} must be true or false")
    if not records:
        raise ValueError(f"none of the {len(cells)} cells of {config.experiment} has a record; run the grid first")
    if len(records) < len(cells) and not config.curate.incomplete:
        raise ValueError(
            f"{len(records)} of the {len(cells)} cells of {config.experiment} have a record; run the grid to its end first, "
            "or file what there is with curate.incomplete=true"
        )
    render(config, cells)
    names = sorted({hardware_name(record) for record in records})
    if len(names) > 1:
        raise ValueError(f"the records come from different hardware ({'; '.join(names)}): file them apart")
    home = Path(config.curate.folder) / _slug(names[0])
    rendered = home / str(config.experiment)
    shutil.rmtree(rendered, ignore_errors=True)
    shutil.copytree(Path(config.paths.runs) / "report" / str(config.experiment), rendered)
    for record in records:
        Ledger(home).write(record)
    say(f"{len(records)} of {len(cells)} records are in {home / 'ledger'}, tables and figure in {rendered}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
