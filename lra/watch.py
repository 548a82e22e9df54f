"""Owns the progress of a grid whose jobs run in other processes: a thread that looks at the ledger now and then."""

import threading
from collections.abc import Sequence
from pathlib import Path

from lra.cells import Cell
from lra.display import display
from lra.ledger import Ledger


class Watch:
    """Reports each record that appears or changes after the watch began. Reading only; it never holds a lock."""

    def __init__(self, cells: Sequence[Cell], runs: str | Path, every_seconds: float = 5.0) -> None:
        self._ledger, self._every = Ledger(runs), every_seconds
        self._cells = {cell.run_id: cell for cell in cells}
        self._seen = {run_id: self._stamp(run_id) for run_id in self._cells}
        self._closed = threading.Event()
        for cell in self._cells.values():
            record = self._ledger.find(cell.run_id)
            if record is not None and record.status == "finished":
                display.advance_grid(f"{cell.title}: already in the ledger")
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._look()

    def _loop(self) -> None:
        while not self._closed.wait(self._every):
            self._look()

    def _look(self) -> None:
        for run_id, cell in self._cells.items():
            stamp = self._stamp(run_id)
            if stamp == self._seen[run_id]:
                continue
            self._seen[run_id] = stamp
            record = self._ledger.find(run_id)
            if record is not None and record.status == "finished":
                display.advance_grid(f"{cell.title}: test accuracy {record.result['test_best']['accuracy']:.4f}")
            elif record is not None:
                display.advance_grid(f"{cell.title}: {record.status}")

    def _stamp(self, run_id: str) -> int:
        """Which file it is: a record is replaced, never edited."""
        try:
            return self._ledger.path(run_id).stat().st_ino
        except FileNotFoundError:
            return 0
