"""What surrounds a run breaks: disk, folders, data, checkpoints, memory, the clock. Each has a clear answer and a way on."""

import ast
import os
import random
import resource
import shutil
import subprocess
import time
from contextlib import suppress

import pytest

import lra.experiment
import lra.training
from lra.ledger import Ledger
from tests.conftest import ROOT
from tests.ops import survival
from tests.ops.survival import at_call, configured, die, only_record, reproducible, run

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
STEP = lra.training.TrainStep


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    survival.train(configured(folder / "runs", folder / "datasets"))
    return reproducible(only_record(folder / "runs")), folder / "datasets"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte, of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    def act():
        with open(folder / "filler", "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1024)):
                pass

    return act


@pytest.mark.parametrize(
    "sabotage_at", [(STEP, "__call__", 14), (lra.experiment, "measure", 1)], ids=["in training", "before the record"]
)
def test_a_full_disk_is_named_and_costs_no_finished_run(sabotage_at, small_disk, tmp_path, undisturbed):
    expected, datasets = undisturbed
    other = configured(small_disk / "runs", datasets, "seed=5")
    assert run(other, tmp_path / "said") == 0, (tmp_path / "said").read_text()
    finished = only_record(small_disk / "runs")
    config = configured(small_disk / "runs", datasets)
    assert run(config, tmp_path / "said", at_call(*sabotage_at, fill(small_disk))) == 1
    said = (tmp_path / "said").read_text()
    assert "No space left on device: '" in said and "type the same command again: what is finished is kept" in said
    assert "Traceback" not in said
    (small_disk / "filler").unlink()
    assert run(config, tmp_path / "said") == 0, (tmp_path / "said").read_text()
    ledger = Ledger(small_disk / "runs")
    assert ledger.find(finished.run_id) == finished
    assert reproducible(ledger.find(expected["run_id"])) == expected


def test_a_file_that_may_not_grow_is_named(tmp_path, undisturbed):
    config = configured(tmp_path / "runs", undisturbed[1])
    limit = at_call(STEP, "__call__", 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)))
    assert run(config, tmp_path / "said", limit) == 1
    assert "File too large: '" in (tmp_path / "said").read_text()
    assert "There is no room for it" in (tmp_path / "said").read_text()
    assert run(config, tmp_path / "said") == 0
    assert reproducible(only_record(tmp_path / "runs")) == undisturbed[0]


def test_a_results_folder_that_may_not_be_written_is_named_before_anything_runs(small_disk, tmp_path, undisturbed):
    config = configured(small_disk / "runs", undisturbed[1])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert run(config, tmp_path / "said") == 1
    said = (tmp_path / "said").read_text()
    assert "Read-only file system" in said and str(small_disk) in said and "LRA_RUNS" in said
    assert "Traceback" not in said


def test_data_that_vanishes_in_mid_run_changes_nothing_and_is_made_again(tmp_path, undisturbed):
    expected, original = undisturbed
    datasets = tmp_path / "datasets"
    shutil.copytree(original, datasets)
    config = configured(tmp_path / "runs", datasets)
    assert run(config, tmp_path / "said", at_call(STEP, "__call__", 10, lambda: shutil.rmtree(datasets))) == 0
    assert reproducible(only_record(tmp_path / "runs")) == expected

    again = configured(tmp_path / "again", datasets)
    assert run(again, tmp_path / "said", at_call(STEP, "__call__", 10, die)) == -9
    shutil.rmtree(datasets)
    assert run(again, tmp_path / "said") == 0
    assert reproducible(only_record(tmp_path / "again")) == expected


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"x" * 99])
def test_a_damaged_checkpoint_is_refused_with_advice_that_works(damage, tmp_path, undisturbed):
    config = configured(tmp_path / "runs", undisturbed[1])
    run(config, tmp_path / "said", at_call(STEP, "__call__", 14, die))
    (path,) = (tmp_path / "runs" / "checkpoints").glob("*.pt")
    path.write_bytes(damage(path.read_bytes()))
    assert run(config, tmp_path / "said") == 1
    assert f"{path}: the checkpoint cannot be read" in (tmp_path / "said").read_text()
    path.unlink()  # as the message advises
    assert run(config, tmp_path / "said") == 0
    assert reproducible(only_record(tmp_path / "runs")) == undisturbed[0]


def test_running_out_of_memory_is_a_result_of_the_cell(tmp_path, undisturbed):
    config = configured(tmp_path / "runs", undisturbed[1], "protocol.measure_batch_size=100000000000")
    assert run(config, tmp_path / "said") == 1
    record = only_record(tmp_path / "runs")
    assert record.status == "oom" and "can't allocate memory" in record.error


def test_a_clock_that_jumps_changes_no_result(tmp_path, undisturbed):
    expected, datasets = undisturbed

    def install():
        draw = random.Random(0)
        time.time = lambda: draw.uniform(-1e9, 4e9)
        time.time_ns = lambda: draw.randrange(2**62)

    assert run(configured(tmp_path / "runs", datasets), tmp_path / "said", install) == 0
    assert reproducible(only_record(tmp_path / "runs")) == expected


def test_the_time_of_day_is_read_for_the_record_alone_and_decides_nothing():
    clocks = {"time", "time_ns", "now", "today", "utcnow", "localtime", "gmtime", "ctime"}
    found = set()
    for room in ("attention", "models", "data", "lra"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in clocks:
                    owner = ast.unparse(node.value).split(".")[-1]
                    if owner in ("time", "datetime", "date"):
                        found.add(f"{room}/{path.name}: {owner}.{node.attr}")
                if isinstance(node, ast.ImportFrom) and node.module == "time":
                    assert not {alias.name for alias in node.names} & clocks, path
    # when a record was made, and the file name of a benchmark's record
    assert found == {"lra/provenance.py: datetime.now", "lra/benchmark.py: datetime.now"}
