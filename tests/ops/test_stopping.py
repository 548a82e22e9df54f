"""A grid that is asked to stop: what runs is put down, what waits is not started, and job=status tells the rest."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import lra.stopping
from lra.stopping import Stop
from tests.conftest import ROOT
from tests.ops.survival import SMALL

GRID = (*SMALL, "experiment=quick", "seed=0,1,2,3", "per_task.listops.num_steps=2000", "per_task.listops.eval_every=1000",
        "protocol.checkpoint_every=1000")  # fmt: skip


def start(tmp_path, *more: str) -> subprocess.Popen:
    environment = {
        **os.environ, "LRA_RUNS": str(tmp_path / "runs"), "LRA_DATASETS": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *GRID, *more], env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until_locked(tmp_path, number: int, process: subprocess.Popen) -> None:
    """Until that many cells are at work in data that is prepared."""
    limit = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < limit:
        locks = [path for path in (tmp_path / "runs" / "ledger").glob(".*.lock") if path.read_text()]
        if len(locks) >= number and list((tmp_path / "datasets").rglob("manifest.json")):
            time.sleep(1)
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate(timeout=10))


@pytest.mark.parametrize(
    ("more", "at_work"),
    [((), 1), (("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), 2)],
    ids=["serial", "joblib"],
)
def test_sigterm_puts_down_what_runs_and_starts_nothing_more(tmp_path, more, at_work, run_cli):
    process = start(tmp_path, *more)
    wait_until_locked(tmp_path, at_work, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "stopped by SIGTERM" in said and "type the same command again to go on" in said
    records = [json.loads(path.read_text())["status"] for path in (tmp_path / "runs" / "ledger").glob("*.json")]
    assert set(records) <= {"finished"}
    checkpoints = list((tmp_path / "runs" / "checkpoints").glob("*.pt"))
    assert 1 <= len(checkpoints) <= at_work
    table = run_cli("job=status", *(item for item in GRID if "seed" not in item), "attention=mean_pool")
    assert table.returncode == 0, table.stderr


def test_a_budget_stops_a_grid_and_status_tells_what_is_left(run_cli, tmp_path):
    done = run_cli("-m", *SMALL, "seed=0,1,2", "budget_minutes=0.001")
    assert done.returncode == 75, done.stderr
    assert "the time budget of 0.001 minutes is spent: 3 of 3 runs are left" in done.stderr
    assert not list((tmp_path / "runs" / "ledger").glob("*.json"))


@pytest.mark.parametrize("minutes", ["0", "soon"])
def test_a_budget_that_is_none_is_refused(run_cli, minutes):
    done = run_cli(*SMALL, f"budget_minutes={minutes}")
    assert done.returncode == 1 and "must be a number above 0" in done.stderr


_WORKER = """
from lra.stopping import Stopped, stop
stop.listen(None)
try:
    stop.point()
except Stopped as stopped:
    print(stopped.exit_code)
"""


def worker_says() -> str:
    return subprocess.run(
        [sys.executable, "-c", _WORKER], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_a_worker_that_starts_after_the_signal_stops_at_once(monkeypatch):
    monkeypatch.setenv(lra.stopping._STOPPED, f"{os.getpid()} 0")  # restored afterwards, whatever the handler sets
    monkeypatch.delenv(lra.stopping._STOPPED)
    monkeypatch.setattr(lra.stopping, "_children", list)
    command = Stop()
    command.forward = True
    assert worker_says() == ""
    command._hear(signal.SIGTERM, None)
    assert worker_says() == f"{128 + signal.SIGTERM}\n"


def test_a_stop_of_another_command_is_not_taken_over(monkeypatch):
    monkeypatch.setenv(lra.stopping._STOPPED, f"1 {int(signal.SIGTERM)}")
    assert worker_says() == ""
