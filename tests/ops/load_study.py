"""Owns the load figures of docs/operations.md: a large ledger and its report, many writers, a grid of a thousand cells.

python -m tests.ops.load_study [records=10000] [writers=500] [cells=1000]
"""

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

from hydra import initialize_config_dir

from lra.cells import cells_of
from lra.grid import grid_of
from lra.html_report import render
from lra.html_report_entries import gather
from lra.ledger import Ledger, RunInProgress
from lra.records import RunRecord
from lra.status import estimate, survey
from lra.tables import tidy
from tests.conftest import ROOT
from tests.lra.synthetic import TASKS, make_ledger
from tests.ops.occasion import occasion

COST = {"examples_per_second": 1.0, "steps_per_second": 1.0, "peak_memory_bytes": 1, "seconds_median": 1.0}
RECORD = RunRecord(
    run_id="", status="finished", experiment="load", task="text", attention="softmax", protocol="quick", seed=0,
    overrides=[], identity={"precision": "fp32", "padding": "x" * 4000},
    data={"stand_in": False, "dataset": "text", "source": "hub", "sha256": {}, "counts": {}},
    result={
        "test_best": {"accuracy": 0.5, "correct": 1, "total": 2, "loss": 1.0, "right": "AAAA" * 800}, "steps": 1,
        "test_final": {"accuracy": 0.5}, "val_best_accuracy": 0.5, "epochs": 1.0, "best_step": 1, "majority_accuracy": 0.5,
        "parameters": 1, "train_curve": [[step, 0.5] for step in range(200)],
    },
    efficiency={
        "train_step": COST, "inference": COST, "parameters": 1, "length": 1, "batch_size": 1, "attention_parameters": 1,
        "attention_buffers": 1, "num_sequences": 1,
    },
    provenance={
        "seconds": {"fit": 1.0, "prepare": 0.0, "test": 0.0}, "commit": None,
        "hardware": {"cpu": "x", "threads": 1, "device": "cpu", "cores": 1},
        "software": {"torch": "x"},
    },
)  # fmt: skip


def timed(what: str, started: float) -> None:
    print(f"{time.monotonic() - started:8.2f} s  {what}", flush=True)


def many_records(folder: Path, count: int) -> None:
    ledger, started = Ledger(folder), time.monotonic()
    for number in range(count):
        ledger.write(dataclasses.replace(RECORD, run_id=f"{number:012x}", seed=number))
    timed(f"write {count:,} records, each flushed to disk", started)
    started = time.monotonic()
    records, damaged = ledger.read_all()
    assert (len(records), damaged) == (count, [])
    timed(f"read {count:,} records", started)
    started = time.monotonic()
    assert len(tidy(records)) == count
    timed(f"a tidy frame of {count:,} records", started)


def large_report(folder: Path, count: int) -> None:
    attentions = [f"attention_{number}" for number in range(50)]
    made = make_ledger(folder, attentions, range(count // (len(TASKS) * len(attentions))), points=100)
    started = time.monotonic()
    page = render(gather([folder]))
    timed(f"the HTML report of {len(made):,} records, {len(page) / 1e6:.1f} MB", started)


def many_writers(folder: Path, count: int) -> None:
    """Each process owns a run of its own, writes it three times over, and tries to take its neighbour's."""
    gate_out, gate_in = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(gate_in)
            os.read(gate_out, 1)  # all at once
            os._exit(_write_own(Ledger(folder), number))
        children.append(child)
    started = time.monotonic()
    os.close(gate_in)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    timed(f"{count} processes write {3 * count} records to one ledger at once", started)
    records, damaged = Ledger(folder).read_all()
    assert set(codes) == {0}, f"{sum(code != 0 for code in codes)} writers failed"
    assert (len(records), damaged) == (count, []), (len(records), damaged)
    assert sorted(record.seed for record in records) == list(range(count))
    assert not [path for path in (folder / "ledger").glob(".*") if path.suffix != ".lock"]


def _write_own(ledger: Ledger, number: int) -> int:
    run_id = f"{number:012x}"
    with ledger.claim(run_id):
        for _ in range(3):
            ledger.write(dataclasses.replace(RECORD, run_id=run_id, seed=number))
        try:
            with ledger.claim(run_id):
                return 1
        except RunInProgress:
            return 0


def many_cells(folder: Path, count: int) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = grid_of({}, ["task=listops,text", "attention=softmax,mean_pool", f"seed=range({count // 4})"])
        for when in ("first", "second"):
            started = time.monotonic()
            cells = cells_of(overrides, folder)
            assert len({cell.run_id for cell in cells}) == len(overrides) == count // 4 * 4
            timed(f"the runs that {len(cells):,} cells mean, {when} time", started)
    ledger, started = Ledger(folder), time.monotonic()
    states = survey(cells, ledger.read_all()[0], ledger)
    assert {item.state for item in states} == {"missing"} and estimate(states, []) is None
    timed(f"the state of {len(cells):,} cells", started)


if __name__ == "__main__":
    records, writers, cells = (int(value) for value in (*sys.argv[1:], *("10000", "500", "1000")[len(sys.argv) - 1 :]))
    print(occasion())
    with tempfile.TemporaryDirectory(prefix="load_study_") as place:
        large_report(Path(place) / "report", records)
        many_records(Path(place) / "large", records)
        many_writers(Path(place) / "busy", writers)
        many_cells(Path(place) / "grid", cells)
