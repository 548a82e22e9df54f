"""Owns the state of a grid, read from the ledger, its locks and the checkpoints: done, running, interrupted, failed,
missing, and how long the rest may take."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lra.cells import Cell, cells_of
from lra.ledger import Ledger
from lra.records import RunRecord

State = Literal["done", "running", "interrupted", "failed", "missing"]
STATES: tuple[State, ...] = ("done", "running", "interrupted", "failed", "missing")


@dataclass(frozen=True)
class CellState:
    """A cell, what became of it, and a note: who runs it, or why it failed."""

    cell: Cell
    state: State
    note: str = ""


def status(config: DictConfig) -> None:
    """The job: of the grid `experiment=<name>`, or without it of all that the ledger knows."""
    from lra.grid import grid_of

    ledger = Ledger(config.paths.runs)
    records, damaged = ledger.read_all()
    if config.experiment:
        hydra = HydraConfig.get()
        cells = cells_of(grid_of(hydra.sweeper.params, list(hydra.overrides.task)), config.paths.runs)
    else:
        cells = [Cell((), record.task, record.label, record.protocol, record.seed, record.run_id) for record in records]
    states = survey(cells, records, ledger)
    print(f"{config.experiment or 'all records'}: {len(states)} runs in {ledger.folder}")
    print("\n".join(_lines(states, estimate(states, records))))
    for line in damaged:
        print(f"cannot be read: {line}")


def survey(cells: Sequence[Cell], records: Sequence[RunRecord], ledger: Ledger) -> list[CellState]:
    """A few system calls per cell."""
    by_id = {record.run_id: record for record in records}
    return [_state_of(cell, by_id.get(cell.run_id), ledger) for cell in cells]


def _state_of(cell: Cell, record: RunRecord | None, ledger: Ledger) -> CellState:
    owner = ledger.owner(cell.run_id)
    if owner is not None:
        return CellState(cell, "running", owner)
    if record is not None and record.status == "finished":
        return CellState(cell, "done")
    if record is not None:
        return CellState(cell, "failed", f"{record.status}: {record.error}")
    if ledger.checkpoint(cell.run_id).exists():
        return CellState(cell, "interrupted", "goes on from its checkpoint")
    return CellState(cell, "missing")


def estimate(states: Sequence[CellState], records: Sequence[RunRecord]) -> float | None:
    """Seconds of work left, one run at a time, by this protocol's records of the same task and attention, or else of the
    same task, or of any. A run that was interrupted counts as a whole one. None where there is nothing to go by."""
    known: dict[tuple[str, ...], list[float]] = {}
    for record in records:
        if record.status == "finished":
            for key in _nearest_first(record):
                known.setdefault(key, []).append(_seconds_of(record))
    total = 0.0
    for item in states:
        if item.state != "done":
            like_it = next((known[key] for key in _nearest_first(item.cell) if key in known), None)
            if like_it is None:
                return None
            total += fmean(like_it)
    return total


def _nearest_first(item: Cell | RunRecord) -> list[tuple[str, ...]]:
    return [(item.protocol, item.task, item.attention), (item.protocol, item.task), (item.protocol,)]


def _seconds_of(record: RunRecord) -> float:
    """The time of the whole run, also where a part of its steps was done before an interruption."""
    seconds, steps = record.provenance["seconds"], record.result["steps"]
    done_then = record.provenance.get("resumed_at_step", 0)
    fit = seconds["fit"] * steps / (steps - done_then) if done_then < steps else seconds["fit"]
    return float(fit + seconds["prepare"] + seconds["test"])


def _lines(states: Sequence[CellState], seconds: float | None) -> list[str]:
    counts = Counter(item.state for item in states)
    lines = [f"  {state:<12}{counts[state]:>5}" for state in STATES]
    if counts["done"] < len(states):
        lines.append("  " + _time_left(seconds, counts["running"]))
    lines += ["", *_matrix(states)] if states else []
    for state in ("running", "interrupted", "failed"):
        lines += [f"{state}: {item.cell.title}: {item.note}" for item in states if item.state == state]
    return lines


def _time_left(seconds: float | None, running: int) -> str:
    if seconds is None:
        return "time left: unknown until a first run is done"
    text = f"time left: about {duration(seconds)}, one run at a time"
    return text + (f"; {duration(seconds / running)} with {running} at work" if running > 1 else "")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _matrix(states: Sequence[CellState]) -> list[str]:
    """Done of all, per attention and task; `!` where one failed, `>` where one is running."""
    tasks = list(dict.fromkeys(item.cell.task for item in states))
    attentions = list(dict.fromkeys(item.cell.attention for item in states))
    width = max(len(name) for name in attentions) + 2
    lines = [" " * width + "".join(f"{task:>12}" for task in tasks)]
    for attention in attentions:
        entries = []
        for task in tasks:
            of_both = Counter(
                item.state for item in states if (item.cell.task, item.cell.attention) == (task, attention)
            )
            marks = ("!" if of_both["failed"] else "") + (">" if of_both["running"] else "")
            entries.append(f"{marks}{of_both['done']}/{of_both.total()}" if of_both else "-")
        lines.append(f"{attention:<{width}}" + "".join(f"{entry:>12}" for entry in entries))
    return [*lines, ""]
