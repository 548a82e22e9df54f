"""Owns what surrounds a grid of runs: the data check before the first run, the bar, and the table after the last."""

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from lra import ranks
from lra.cells import cells_of
from lra.cli import tell
from lra.display import display, say
from lra.launching import launcher_of
from lra.ledger import Ledger
from lra.status import survey
from lra.stopping import Stopped, stop
from lra.watch import Watch


class GridCallback(Callback):
    """Hooked into Hydra's multirun by conf/config.yaml; single runs never meet it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with _failing_loudly():
            _open_grids.append(Grid(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Serial grids only: elsewhere this runs in the process of the job, where no grid is open."""
        if job_return.status == JobStatus.FAILED and _open_grids:
            error = job_return._return_value
            if isinstance(error, Stopped):
                sys.exit(finish_grid(error))
            _open_grids[-1].note_failure(job_return.overrides or [], str(error).strip())

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        finish_grid(None)


class Grid:
    """The grid at work. What became of a cell is read from the ledger: its job may have run on another machine."""

    def __init__(self, config: DictConfig) -> None:
        self.config, self.launcher = config, launcher_of(config)
        self.overrides = grid_of(config.hydra.sweeper.params, list(config.hydra.overrides.task))
        self.trains = config.job._target_ == "lra.experiment.train"
        self._failures: dict[str, str] = {}
        missing = self.launcher.complaints(config) or ranks.complaints(config) or missing_data(self.overrides)
        if missing:
            say("\n".join(missing))
            sys.exit(1)
        self.cells = cells_of(self.overrides, config.paths.runs) if self.trains else []
        stop.listen(config.budget_minutes)
        stop.forward = self.launcher.children_on_this_machine
        display.open_grid(str(config.experiment or "grid"), len(self.overrides))
        self.watch = None
        if self.trains and not self.launcher.serial:
            self.watch = Watch(self.cells, config.paths.runs)

    def note_failure(self, overrides: Sequence[str], error: str) -> None:
        self._failures[" ".join(overrides)] = error

    def finish(self, error: Exception | None) -> int | None:
        """Close the bars, render the table, list what failed. The exit code, or None where `error` came from no cell."""
        stop.forward = False
        if self.watch is not None:
            self.watch.close()
        display.close_grid()
        if self.config.experiment and self.trains:
            from lra.report import render

            render(self.config, self.cells)
        failed, unfinished = self._failed_and_unfinished()
        if failed:
            say(f"{len(failed)} of {len(self.overrides)} runs failed:\n  " + "\n  ".join(failed))
        if isinstance(error, Stopped):
            say(f"{error}: {unfinished} of {len(self.overrides)} runs are left; type the same command again to go on")
            return error.exit_code  # also where cells failed: the command that ends the grid tells of them again
        unknown = error is not None and str(error).strip() not in "\n".join(failed)
        if unknown and self.launcher.serial:
            return None
        if unknown:
            say(f"the launcher reports {type(error).__name__}: {str(error).strip()}")
        if unfinished:
            say(f"{unfinished} of {len(self.overrides)} runs left no record; job=status lists them")
        return 1 if failed or unfinished or unknown else 0

    def _failed_and_unfinished(self) -> tuple[list[str], int]:
        """One line per cell that failed, and the number of those that are not done and did not fail."""
        failed, unfinished = dict(self._failures), 0
        if self.trains:
            ledger = Ledger(self.config.paths.runs)
            for item in survey(self.cells, ledger.read_all()[0], ledger):
                known = any(set(item.cell.overrides) <= set(typed.split()) for typed in self._failures)
                if item.state == "failed" and not known:
                    failed[item.cell.title] = item.note
                unfinished += item.state not in ("done", "failed") and not known
        return [f"{name}: {reason}" for name, reason in failed.items()], unfinished


_open_grids: list[Grid] = []


def finish_grid(error: Exception | None) -> int | None:
    """Finish the open grid, if there is one. Hydra skips its own hook when a job failed: then lra.cli calls this."""
    if not _open_grids:
        return None
    with _failing_loudly():
        return _open_grids.pop().finish(error)


@contextmanager
def _failing_loudly() -> Iterator[None]:
    """Hydra turns a callback's exception into a warning; here it ends the command."""
    try:
        yield
    except Stopped as stopped:
        say(f"{stopped}; type the same command again to go on")
        sys.exit(stopped.exit_code)
    except Exception as error:
        tell(error, Path(__file__).resolve().parents[1] / "conf")
        sys.exit(1)


def grid_of(sweep: Mapping[str, Any] | None, typed: Sequence[str]) -> list[list[str]]:
    """The override lists of a grid's cells: the sweep that the experiment states, as changed by what was typed."""
    stated = {str(key): str(value) for key, value in (sweep or {}).items()}
    fixed = list(typed)
    for text in typed:
        stated.pop(text.split("=", 1)[0], None)
    parser = OverridesParser.create(config_loader=_loader())
    choices = []
    for override in parser.parse_overrides([*fixed, *(f"{key}={value}" for key, value in stated.items())]):
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line or ""])
    return [list(cell) for cell in itertools.product(*choices)]


def compose_cell(overrides: list[str]) -> DictConfig:
    """The configuration of one cell, with its names filled in (outside a job Hydra does not know its choices)."""
    typed = [item for item in overrides if not item.startswith(("hydra.", "hydra/"))]
    config = _loader().load_configuration("config", typed, run_mode=RunMode.RUN)
    choices = config.hydra.runtime.choices
    with open_dict(config):
        config.names = {name: choices[name] for name in config.names}
    return config


def missing_data(cells: list[list[str]]) -> list[str]:
    """What the grid's tasks miss, in readable lines; empty when every task can start."""
    lines: list[str] = []
    seen = set()
    for cell in cells:
        task_only = tuple(
            item
            for item in cell
            if re.split("[.@=]", item.lstrip("+~"))[0] not in ("attention", "projection", "seed", "model")
        )
        if task_only in seen:
            continue
        seen.add(task_only)
        config = compose_cell(list(task_only))
        OmegaConf.resolve(config.task)
        for item in instantiate(config.task).check():
            if item.fetchable:
                continue
            lines.append(
                f"  {config.names.task} (source {config.task.source}): {item.what} is missing\n"
                f"    expected at  {item.expected_at}\n    how to get it {item.how_to_get}"
            )
    if lines:
        lines.insert(0, "Data is missing; nothing was started.")
    return lines


def search_path() -> list[Path]:
    """The folders that configuration files come from: conf/, and what --config-dir adds."""
    sources = [source for source in _loader().get_sources() if source.scheme() == "file"]
    return [Path(source.path).resolve() for source in sources]


def _loader() -> ConfigLoaderImpl:
    return GlobalHydra.instance().config_loader()  # type: ignore[return-value]
