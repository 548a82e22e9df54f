"""What a user types: runs, grids, stops, mistakes. Every test is a process of its own, as a user's would be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

# ListOps, a few steps: seconds
TINY = (
    "task=listops", "threads=1", "per_task.listops.num_train=200", "per_task.listops.num_val=40",
    "per_task.listops.num_test=50", "per_task.listops.max_length=40", "per_task.listops.max_len=40",
    "per_task.listops.num_steps=30", "per_task.listops.warmup_steps=5", "per_task.listops.eval_every=10",
    "protocol.checkpoint_every=10", "protocol.measure_repetitions=2",
)  # fmt: skip


def records_in(tmp_path: Path) -> dict[str, dict]:
    found = {}
    for path in sorted((tmp_path / "runs" / "ledger").glob("*.json")):
        record = json.loads(path.read_text())
        found[f"{record['task']}/{record['attention']}/{record['seed']}"] = record
    return found


def inspect(folder: Path, *flags: str) -> list[dict]:
    """What an offline wandb run holds, through wandb's own reader."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", *flags, "--json", str(folder)],
        capture_output=True, text=True, check=True, timeout=60, env={**os.environ, "WANDB_MODE": "offline"},
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] or [json.loads(done.stdout)]


def test_one_run_leaves_a_record_and_an_offline_wandb_run_with_its_tables(run_cli, tmp_path):
    done = run_cli(*TINY, "attention=schoenbat_exp")
    assert done.returncode == 0, done.stderr
    (record,) = records_in(tmp_path).values()
    assert record["status"] == "finished"
    assert record["result"]["test_best"]["total"] == 50
    assert record["result"]["steps"] == 30
    assert record["data"]["sha256"].keys() == {"train", "val", "test"}
    assert record["efficiency"]["train_step"]["examples_per_second"] > 0
    assert record["efficiency"]["train_step"]["peak_memory_bytes"] > record["efficiency"]["parameters"]
    assert not list((tmp_path / "runs" / "checkpoints").glob("*.pt"))
    _check_wandb(tmp_path, record)

    started = time.monotonic()
    again = run_cli(*TINY, "attention=schoenbat_exp")
    assert again.returncode == 0
    assert "finished before" in again.stderr
    assert time.monotonic() - started < 60
    assert len(list((tmp_path / "runs" / "wandb").glob("offline-run-*"))) == 1


def _check_wandb(tmp_path, record):
    (folder,) = (tmp_path / "runs" / "wandb").glob("offline-run-*")
    assert folder.name.endswith(record["run_id"])
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in folder.rglob("*.table.json")}
    assert set(tables) == {"runs", "accuracy", "throughput"}
    row = dict(zip(tables["accuracy"]["columns"], tables["accuracy"]["data"][0], strict=True))
    assert row["test_accuracy"] == record["result"]["test_best"]["accuracy"]
    assert (row["task"], row["attention"], row["total"]) == ("listops", "schoenbat_exp", 50)
    speed = dict(zip(tables["throughput"]["columns"], tables["throughput"]["data"][0], strict=True))
    assert speed["train_examples_per_second"] == record["efficiency"]["train_step"]["examples_per_second"]
    text = json.dumps(inspect(folder))
    for fact in (
        "attention:schoenbat_exp",
        "task:listops",
        "kernel:Exp",
        "data:generated",
        "test/accuracy",
        "train/loss",
    ):
        assert fact in text, fact
    # table artifacts are staged inside the runs folder, not in the user's home
    assert list((tmp_path / "runs" / "wandb" / ".staging").rglob("*"))


def test_a_killed_run_goes_on_and_ends_with_the_same_result(run_cli, tmp_path):
    whole = run_cli(*TINY, "attention=softmax", environment={"LRA_RUNS": str(tmp_path / "whole")})
    assert whole.returncode == 0, whole.stderr
    (expected,) = [json.loads(path.read_text()) for path in (tmp_path / "whole" / "ledger").glob("*.json")]

    environment = {
        **os.environ, "LRA_RUNS": str(tmp_path / "runs"), "LRA_DATASETS": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "run.py"), *TINY, "attention=softmax", "tracking=disabled"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "runs" / "checkpoints"
    limit = time.monotonic() + 120
    while not list(checkpoints.glob("*.pt")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run_cli(*TINY, "attention=softmax", "tracking=disabled")
    assert resumed.returncode == 0, resumed.stderr
    (record,) = records_in(tmp_path).values()
    assert record["result"] == expected["result"]
    assert record["identity"] == expected["identity"]


def test_a_grid_runs_once_renders_its_table_and_repeats_nothing(run_cli, tmp_path):
    arguments = ("experiment=quick", *TINY, "attention=softmax,mean_pool", "tracking=disabled")
    first = run_cli(*arguments)
    assert first.returncode == 0, first.stderr
    assert set(records_in(tmp_path)) == {"listops/softmax/0", "listops/mean_pool/0"}
    folder = tmp_path / "runs" / "report" / "quick"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "accuracy.md", "accuracy.tex", "accuracy.csv", "efficiency.md", "efficiency.tex", "efficiency.csv", "runs.csv",
        "accuracy_against_throughput.png", "accuracy_against_throughput.pdf",
    }  # fmt: skip
    assert "| softmax" in first.stdout and "| mean_pool" in first.stdout
    before = {path: path.read_bytes() for path in folder.iterdir()}
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "ledger").glob("*.json")}
    second = run_cli(*arguments)
    assert second.returncode == 0, second.stderr
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "ledger").glob("*.json")}
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    rendered = run_cli("job=report", "tracking=disabled")
    assert rendered.returncode == 0, rendered.stderr
    assert "| softmax" in rendered.stdout and (tmp_path / "runs" / "report" / "all" / "accuracy.csv").exists()
    _check_curation(run_cli, tmp_path)


def _check_curation(run_cli, tmp_path):
    asked = ("job=curate", "experiment=quick", *TINY, f"curate.folder={tmp_path / 'measured'}")
    incomplete = run_cli(*asked)
    assert incomplete.returncode == 1
    assert "1 of the 5 cells of quick have a record; run the grid to its end first" in incomplete.stderr
    assert not (tmp_path / "measured").exists()
    partial = run_cli(*asked, "curate.incomplete=true")
    assert partial.returncode == 0, partial.stderr
    assert "1 of 5 records are in" in partial.stderr
    filed = run_cli(*asked, "hydra.sweeper.params.attention='softmax,mean_pool'")
    assert filed.returncode == 0, filed.stderr
    (home,) = (tmp_path / "measured").iterdir()
    own = {path.name: path.read_bytes() for path in (tmp_path / "runs" / "ledger").glob("*.json")}
    assert own == {path.name: path.read_bytes() for path in (home / "ledger").glob("*.json")}
    assert "mean_pool" in (home / "quick" / "accuracy.md").read_text()


def test_one_failing_cell_stops_no_other_and_the_exit_code_says_so(run_cli, tmp_path):
    arguments = (*TINY, "tracking=disabled", "attention=mean_pool", "protocol.learning_rate=1e-3,1e30")
    done = run_cli("-m", *arguments, "protocol.gradient_clip=none")
    assert done.returncode == 1
    statuses = sorted(json.loads(path.read_text())["status"] for path in (tmp_path / "runs" / "ledger").glob("*.json"))
    assert statuses == ["diverged", "finished"]
    assert "1 of 2 runs failed" in done.stderr and "at step 2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("task=lisops",), ("Could not find 'task/lisops'", "pathfinder", "Did you mean task=listops?")),
        (("attention=schoenbat_exo",), ("schoenbat_exp", "linear_transformer", "Did you mean")),
        (("protocol=papr",), ("quick", "schoenbat", "skyformer")),
        (("seeed=1",), ("Known keys: ", "Did you mean seed?")),
        (("attention=performer", "attention.nb_features=3"), ("Known keys of attention: ", "feature_map")),
        (("seed=abc",), ("seed=abc must be a whole number",)),
        (("precision=fp8",), ("choose fp32 or bf16",)),
        (("device=tpu",), ("choose auto, cpu or cuda",)),
        (("model.num_heads=3",), ("model.dim=64 is not divisible by model.num_heads=3",)),
        (("protocol.num_steps=many",), ("protocol.num_steps='many' must be of type int",)),
        (("attention=schoenbat_exp", "attention.feature_map.num_features=1"), ("num_features=1 is too small",)),
        (("+attention.foo=1",), ("unexpected keyword argument 'foo'",)),
        (
            ("attention=softmax", "projection@attention.feature_map.projection=qmc"),
            ("This attention has no projection",),
        ),
        (("attention=rfa", "projection@attention.feature_map.projection=srht"), ("rows that are not N(0, I)", "scrf")),
        (("task=listops", "task.source=official"), ("basic_train.tsv", "task.source=generated")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_mistake_gets_an_answer_that_helps_and_exit_code_1(run_cli, tmp_path, arguments, expected):
    done = run_cli(*arguments, "tracking=disabled")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr
    assert not list((tmp_path / "runs" / "ledger").glob("*.json"))


def test_missing_official_data_is_listed_for_all_tasks_before_anything_starts(run_cli, tmp_path):
    done = run_cli("experiment=accuracy", "tracking=disabled", environment={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    for text in (
        "listops",
        "basic_train.tsv",
        "retrieval",
        "new_aan_pairs",
        "pathfinder32",
        "text",
        "image",
        "expected at",
    ):
        assert text in done.stderr, text
    assert not (tmp_path / "runs" / "ledger").exists()


def test_offline_tracking_never_asks_and_needs_no_key(run_cli):
    done = run_cli(*TINY, "attention=mean_pool", "tracking=online", environment={"HOME": "/nonexistent"})
    assert done.returncode == 1
    assert "tracking=online needs an account" in done.stderr
