"""Owns what surrounds a grid of runs: the data check before the first run, the bar, and the table after the last."""

import itertools
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from lra.display import display, say


class GridCallback(Callback):
    """Hooked into Hydra's multirun by conf/config.yaml; single runs never meet it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with _failing_loudly():
            _open_grids.append(Grid(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return.status == JobStatus.FAILED and _open_grids:
            error = str(job_return._return_value).strip()
            _open_grids[-1].failed.append(f"{' '.join(job_return.overrides or [])}: {error}")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        finish_grid()


class Grid:
    """The grid at work."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.cells = grid_of(config.hydra.sweeper.params, list(config.hydra.overrides.task))
        self.failed: list[str] = []
        missing = missing_data(self.cells)
        if missing:
            say("\n".join(missing))
            sys.exit(1)
        display.open_grid(str(config.experiment or "grid"), len(self.cells))

    def finish(self) -> None:
        display.close_grid()
        if self.config.experiment:
            from lra.report import render

            render(self.config, self.cells)
        if self.failed:
            say(f"{len(self.failed)} of {len(self.cells)} runs failed:\n  " + "\n  ".join(self.failed))


_open_grids: list[Grid] = []


def finish_grid() -> None:
    """Close the bars, render the table, list what failed. Hydra skips its own hook when a job failed: then lra.cli
    calls this."""
    if _open_grids:
        with _failing_loudly():
            _open_grids.pop().finish()


@contextmanager
def _failing_loudly() -> Iterator[None]:
    """Hydra turns a callback's exception into a warning; here it ends the command."""
    try:
        yield
    except Exception:
        traceback.print_exc()
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
    typed = [item for item in overrides if not item.startswith("hydra.")]
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
            item for item in cell if item.split("=")[0].split(".")[0] not in ("attention", "seed", "model")
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


def _loader() -> ConfigLoaderImpl:
    return GlobalHydra.instance().config_loader()  # type: ignore[return-value]
