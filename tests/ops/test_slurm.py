"""The real thing: a grid of eight jobs through a real SLURM, with one job cancelled and one requeued on the way."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.ops import slurm
from tests.ops.survival import SMALL

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="daemons of a SLURM of one's own need root"),
    pytest.mark.skipif(bool(slurm.missing()), reason=f"{slurm.missing()} not found; as root: {slurm.INSTALL}"),
    pytest.mark.timeout(1800),
]
pytest.importorskip(
    "hydra_plugins.hydra_submitit_launcher",
    reason="python -m pip install --require-hashes --no-deps -r requirements/slurm.txt",
)

GRID = (
    "experiment=quick", *SMALL, "seed=0,1,2,3,4,5,6,7", "per_task.listops.num_steps=5000", "per_task.listops.eval_every=2500",
    "protocol.checkpoint_every=250",
)  # fmt: skip
SLURM = (
    "hydra/launcher=submitit_slurm", "hydra.launcher.partition=main", "hydra.launcher.mem_gb=1", "hydra.launcher.timeout_min=60",
    "hydra.launcher.array_parallelism=2", "hydra.launcher.cpus_per_task=1",
)  # fmt: skip


def command(tmp_path: Path, runs: str, *more: str, base: dict[str, str] | None = None) -> dict:
    places = {"LRA_RUNS": str(tmp_path / runs), "LRA_DATASETS": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1"}
    return {
        "args": [sys.executable, str(ROOT / "run.py"), *GRID, *more], "env": {**(base or os.environ), **places},
        "cwd": tmp_path, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
    }  # fmt: skip


def wait_for(condition, what: str, seconds: float = 300):
    limit = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < limit, f"waited in vain for {what}"
        time.sleep(0.05)


def records(runs: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (runs / "ledger").glob("*.json")}


def disturb(runs: Path, ask) -> tuple[str, str]:
    """Once a checkpoint is there: requeue one running job and cancel another. Returns both, once the queue is empty."""

    def running() -> list[str]:
        return ask("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%i").split()

    wait_for(lambda: list(runs.glob("checkpoints/*.pt")), "a checkpoint")
    requeued = wait_for(running, "a running job")[0]
    ask("scontrol", "requeue", requeued)
    older = {requeued, *running()}  # these may end before they can be cancelled; one that starts now cannot
    cancelled = wait_for(lambda: [job for job in running() if job not in older], "a job that starts")[0]
    ask("scancel", cancelled)

    def is_empty() -> bool:
        queue = ask("squeue", "-h", "-r", "-o", "%i %r")
        if f"{requeued} BeginTime" in queue:  # SLURM holds a requeued job back for two minutes
            ask("scontrol", "update", f"jobid={requeued}", "starttime=now")
        return not queue.strip()

    wait_for(is_empty, "the queue to be empty", 600)
    return requeued, cancelled


def test_a_grid_with_a_cancelled_and_a_requeued_job_ends_with_the_table_of_the_serial_one(tmp_path):
    serial = subprocess.run(**command(tmp_path, "serial"), timeout=400, check=False)
    assert serial.returncode == 0, serial.stderr
    runs = tmp_path / "cluster"
    with slurm.one_node() as cluster:

        def ask(*arguments: str) -> str:
            done = subprocess.run(arguments, env=cluster, capture_output=True, text=True, timeout=60, check=True)
            return done.stdout

        with subprocess.Popen(**command(tmp_path, "cluster", *SLURM, base=cluster)) as driver:
            try:
                requeued, cancelled = disturb(runs, ask)
                said = driver.communicate(timeout=200)[1]
            finally:
                driver.kill()
        jobs = ask("sacct", "-X", "-n", "-D", "-o", "JobID%20,State%20")
        assert driver.returncode == 1 and "the launcher reports UncompletedJobError" in said, said
        assert re.search(rf"{cancelled} +CANCELLED", jobs) and re.search(rf"{requeued} +REQUEUED", jobs), jobs
        assert len(records(runs)) == 7, (said, jobs)
        assert max(record["provenance"]["resumed_at_step"] for record in records(runs).values()) > 0
        again = subprocess.run(**command(tmp_path, "cluster", *SLURM, base=cluster), timeout=400, check=False)
        assert again.returncode == 0, again.stderr
    print(jobs, said, again.stderr, again.stdout, sep="\n")
    for name in ("accuracy.md", "accuracy.tex", "accuracy.csv"):
        here, there = (
            [
                line
                for line in (tmp_path / folder / "report" / "quick" / name).read_text().splitlines()
                if "ommit" not in line
            ]
            for folder in ("serial", "cluster")
        )  # a note names the commit: it may move on while a developer's test runs
        assert here == there
    for run_id, record in records(tmp_path / "serial").items():
        assert records(runs)[run_id]["result"] == record["result"]
