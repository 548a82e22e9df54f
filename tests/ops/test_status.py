"""The state of a grid from files alone, the estimate, the GPUs of a machine, and what launchers are refused for."""

import dataclasses
import os
import time

import pytest
from omegaconf import OmegaConf

from lra import gpus
from lra.cells import Cell
from lra.launching import launcher_of
from lra.ledger import Ledger
from lra.records import RunRecord
from lra.status import CellState, duration, estimate, survey
from lra.watch import Watch

RECORD = RunRecord(
    run_id="a", status="finished", experiment=None, task="text", attention="softmax", protocol="quick", seed=0, overrides=[],
    identity={}, data={}, result={"steps": 100, "test_best": {"accuracy": 0.5}},
    provenance={"seconds": {"prepare": 1.0, "fit": 8.0, "test": 1.0}, "resumed_at_step": 0},
)  # fmt: skip


def cell(run_id: str, task: str = "text", attention: str = "softmax", protocol: str = "quick") -> Cell:
    return Cell((), task, attention, protocol, 0, run_id)


def test_every_state_is_told_from_the_files(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write(RECORD)
    ledger.write(dataclasses.replace(RECORD, run_id="b", status="oom", error="can't allocate memory"))
    ledger.checkpoint("c").parent.mkdir(parents=True)
    ledger.checkpoint("c").touch()
    with ledger.claim("d"):
        found = survey([cell(name) for name in "abcde"], ledger.read_all()[0], ledger)
        assert [item.state for item in found] == ["done", "failed", "interrupted", "running", "missing"]
        assert found[1].note == "oom: can't allocate memory" and f"process {os.getpid()}" in found[3].note
    assert survey([cell("d")], [], ledger)[0].state == "missing"


def test_looking_at_a_lock_never_costs_a_run_its_start(tmp_path):
    ledger = Ledger(tmp_path)
    with ledger.claim("a"):
        pass
    child = os.fork()
    if child == 0:
        limit = time.monotonic() + 1
        while time.monotonic() < limit:
            ledger.owner("a")
        os._exit(0)
    for _ in range(200):
        with ledger.claim("a"):
            pass
    os.waitpid(child, 0)


def test_the_estimate_goes_by_the_nearest_records_of_the_same_protocol():
    other = dataclasses.replace(RECORD, run_id="b", attention="performer", provenance={
        "seconds": {"prepare": 0.0, "fit": 5.0, "test": 1.0}, "resumed_at_step": 50})  # fmt: skip
    assert estimate([CellState(cell("x"), "missing")], [RECORD, other]) == 10
    assert (
        estimate([CellState(cell("x", attention="performer"), "missing")], [RECORD, other]) == 11
    )  # half was done before
    assert estimate([CellState(cell("x", attention="rfa"), "failed")], [RECORD, other]) == 10.5
    assert estimate([CellState(cell("x"), "done")], [RECORD]) == 0
    assert estimate([CellState(cell("x", protocol="skyformer"), "missing")], [RECORD]) is None


def test_durations_read_well():
    assert [duration(seconds) for seconds in (5, 130, 9000)] == ["5 s", "2 min", "2.5 h"]


def test_a_watch_reports_each_record_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lra.watch.display.advance_grid", said.append)
    ledger = Ledger(tmp_path)
    ledger.write(RECORD)
    watch = Watch([cell("a"), cell("b"), cell("c")], tmp_path, every_seconds=0.01)
    ledger.write(dataclasses.replace(RECORD, run_id="b"))
    time.sleep(0.1)
    ledger.write(dataclasses.replace(RECORD, run_id="c", status="diverged"))
    watch.close()
    assert said == [
        "text / softmax / seed 0: already in the ledger", "text / softmax / seed 0: test accuracy 0.5000",
        "text / softmax / seed 0: diverged",
    ]  # fmt: skip


def test_each_process_holds_a_gpu_of_its_own_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpus, "_held", {})
    assert gpus.hold_one(["one", "two"]) == gpus.hold_one(["one", "two"]) == 0
    monkeypatch.setattr(gpus, "_held", {})  # what another process sees
    first = gpus._held
    assert gpus.hold_one(["one", "two"]) == 1 and list(first) == ["two"]


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = []
    for _ in range(2):
        monkeypatch.setattr(gpus, "_held", {})
        gpus.hold_one(["one", "two"])
        kept.append(gpus._held)
    monkeypatch.setattr(gpus, "_held", {})
    with pytest.raises(ValueError, match=r"all 2 GPUs .*n_jobs=2"):
        gpus.hold_one(["one", "two"])


@pytest.mark.parametrize(
    ("target", "paths", "launcher", "complaint"),
    [
        ("hydra._internal.core_plugins.basic_launcher.BasicLauncher", "runs", {}, None),
        ("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "runs", {}, None),
        ("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", "runs", {}, "absolute paths"),
        (
            "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
            "/r",
            {"timeout_min": 10},
            "60 or more",
        ),
        ("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", "/r", {"timeout_min": 60}, None),
        ("hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher", "/r", {}, "requirements/ray.txt"),
    ],
)
def test_what_a_launcher_cannot_do_is_said_before_anything_starts(target, paths, launcher, complaint, monkeypatch):
    installed = {"hydra_plugins.hydra_joblib_launcher", "hydra_plugins.hydra_submitit_launcher"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    config = OmegaConf.create({
        "paths": {"runs": paths, "datasets": paths}, "hydra": {"launcher": {"_target_": target, **launcher}},
    })  # fmt: skip
    said = launcher_of(config).complaints(config)
    assert (said == []) if complaint is None else (complaint in said[0])
