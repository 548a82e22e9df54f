"""The real thing: a grid on a Ray cluster of two nodes, one of which is killed in mid-run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.ops.survival import SMALL

ray = pytest.importorskip("ray", reason="python -m pip install --require-hashes --no-deps -r requirements/ray.txt")
pytest.importorskip(
    "hydra_plugins.hydra_ray_launcher",
    reason="python -m pip install --require-hashes --no-deps -r requirements/ray.txt",
)
pytestmark = pytest.mark.timeout(1500)

GRID = (
    "experiment=quick", *SMALL, "seed=0,1,2,3", "per_task.listops.num_steps=200", "per_task.listops.eval_every=100",
    "protocol.checkpoint_every=10",
)  # fmt: skip
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def kill_all(process: subprocess.Popen) -> None:
    """The process and all that it started, at once, as a power cut would."""
    for number in [*descendants(process.pid), process.pid]:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def node(stack: ExitStack, log: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block", *arguments]
    file = stack.enter_context(open(log, "wb"))  # noqa: SIM115
    process = subprocess.Popen(
        command, env={**os.environ, **SETTINGS}, stdout=file, stderr=file, stdin=subprocess.DEVNULL
    )
    stack.callback(kill_all, process)
    return process


def wait_for(condition, what: str, seconds: float = 400) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited in vain for {what}"
        time.sleep(0.1)


def nodes_alive(address: str) -> int:
    code = f"import ray; ray.init({address!r}, log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **SETTINGS}, capture_output=True, text=True, check=False
    )
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def run_grid(tmp_path: Path, runs: str, *more: str, **settings: str) -> subprocess.Popen:
    places = {"LRA_RUNS": str(tmp_path / runs), "LRA_DATASETS": str(tmp_path / "datasets")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *GRID, *more], env={**os.environ, **SETTINGS, **places, **settings},
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def results(runs: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text())["result"] for path in (runs / "ledger").glob("*.json")}


def test_a_grid_whose_node_is_killed_ends_with_the_results_of_the_serial_one(tmp_path):
    serial = run_grid(tmp_path, "serial")
    assert serial.wait(400) == 0, serial.communicate()
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    with ExitStack() as stack:
        node(stack, tmp_path / "head", "--head", f"--port={port}", "--include-dashboard=false")
        wait_for(lambda: nodes_alive(address) == 1, (tmp_path / "head").read_text)
        second = node(stack, tmp_path / "second", f"--address={address}")
        wait_for(lambda: nodes_alive(address) == 2, "the second node")
        grid = run_grid(tmp_path, "cluster", "hydra/launcher=ray", RAY_ADDRESS=address)
        stack.callback(grid.kill)
        checkpoints = tmp_path / "cluster" / "checkpoints"
        wait_for(lambda: len(list(checkpoints.glob("*.pt"))) == 2 or grid.poll() is not None, "a cell on each node")
        kill_all(second)
        said = grid.communicate(timeout=600)
        assert grid.returncode == 0, said
    assert results(tmp_path / "cluster") == results(tmp_path / "serial")
    assert len(results(tmp_path / "serial")) == 4
