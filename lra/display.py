"""Owns what a person sees while work goes on: a bar over the grid with an ETA, one per run, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lra.launching import is_launched_job

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Display:
    """Bars on a terminal; on a pipe or in a log file one line per finished run and one per 30 s within a run."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._grid: TaskID | None = None
        self._grid_total = self._grid_done = 0
        self._grid_started = 0.0

    def open_grid(self, title: str, total: int) -> None:
        self._grid_total, self._grid_done, self._grid_started = total, 0, time.monotonic()
        if console.is_terminal:
            self._start()
            assert self._progress is not None
            self._grid = self._progress.add_task(title, total=total, note="")
        else:
            say(f"{title}: {total} runs")

    @property
    def in_grid(self) -> bool:
        """Whether this run is one of a grid's: shown here, or by the command that launched it elsewhere."""
        return self._grid_total > 0 or is_launched_job()

    def advance_grid(self, note: str) -> None:
        """One more run of the grid is through."""
        if not self._grid_total:
            return
        self._grid_done += 1
        if self._progress is not None and self._grid is not None:
            self._progress.update(self._grid, advance=1, note=note)
            return
        elapsed = time.monotonic() - self._grid_started
        left = elapsed / self._grid_done * (self._grid_total - self._grid_done)
        say(f"[{self._grid_done}/{self._grid_total}, {elapsed:.0f} s, about {left:.0f} s left] {note}")

    def close_grid(self) -> None:
        self._grid_total = 0
        self._stop()

    @contextmanager
    def run(self, title: str, total: int) -> Iterator["RunBar"]:
        opened = False
        if console.is_terminal and self._progress is None and not is_launched_job():
            self._start()
            opened = True
        bar = RunBar(self._progress, title, total)
        try:
            yield bar
        finally:
            bar.close()
            if opened:
                self._stop()

    def _start(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._progress.start()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._grid = None


class RunBar:
    """The bar of one run."""

    def __init__(self, progress: Progress | None, title: str, total: int) -> None:
        self._progress, self._title, self._total = progress, title, total
        self._task = None if progress is None else progress.add_task(title, total=total, note="")
        self._said = time.monotonic()

    def update(self, completed: int, note: str | None = None) -> None:
        if self._progress is not None and self._task is not None:
            fields = {} if note is None else {"note": note}
            self._progress.update(self._task, completed=completed, **fields)
        elif time.monotonic() - self._said > 30:
            self._said = time.monotonic()
            say(f"  {self._title}: step {completed}/{self._total} {note or ''}".rstrip())

    def close(self) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)


def say(message: str) -> None:
    """A line for a person; it does not tear a bar that is being drawn."""
    if console.is_terminal:
        console.print(message, markup=False)
    else:
        print(message, file=sys.stderr, flush=True)


display = Display()
