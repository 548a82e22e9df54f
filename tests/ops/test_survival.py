"""A run that is killed anywhere, stopped, or run twice at once ends with the record of an undisturbed run."""

import os
import random
import signal
import time

import pytest
import torch

import lra.experiment
import lra.training
from data.base import Task
from lra.checkpoint import load_checkpoint
from lra.ledger import Ledger
from lra.stopping import BUDGET_SPENT
from tests.ops import survival
from tests.ops.survival import at_batch, at_call, at_write, configured, die, only_record, reproducible

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The record of the run when nobody hurts it, the data that it made, and how long it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = configured(folder / "runs", folder / "datasets")
    survival.train(config)  # in this process: the children find everything imported and compiled
    again = configured(folder / "again", folder / "datasets")
    started = time.monotonic()
    assert survival.run(again, folder / "said") == 0, (folder / "said").read_text()
    seconds = time.monotonic() - started
    expected = reproducible(only_record(folder / "runs"))
    assert reproducible(only_record(folder / "again")) == expected
    return expected, folder / "datasets", seconds


def check_it_recovers(tmp_path, config, expected):
    with survival.nothing_left_behind(tmp_path / "runs"):
        assert survival.run(config, tmp_path / "said") == 0, (tmp_path / "said").read_text()
    assert reproducible(only_record(tmp_path / "runs")) == expected


MOMENTS = {
    "data preparation, in mid-file": (at_write(r"/datasets/.*npy", 2, die), True),
    "data preparation, before the manifest": (at_write(r"/datasets/.*manifest", 1, die), True),
    "the first step": (at_call(lra.training.TrainStep, "__call__", 1, die), False),
    "a step between checkpoints": (at_call(lra.training.TrainStep, "__call__", 14, die), False),
    "a validation": (at_batch(lra.training, 5, die), False),
    "a checkpoint, in mid-file": (at_write(r"\.pt\.", 3, die), False),
    "a checkpoint, just in place": (at_write(r"\.pt$", 4, die, renamed=True), False),
    "the test": (at_batch(lra.experiment, 2, die), False),
    "the measurement": (at_call(lra.experiment, "measure", 1, die), False),
    "the record, in mid-file": (at_write(r"/ledger/.*json", 1, die), False),
    "the record, just in place": (at_write(r"/ledger/.*json$", 1, die, renamed=True), False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in(moment, tmp_path, undisturbed):
    expected, datasets, _ = undisturbed
    sabotage, fresh_data = MOMENTS[moment]
    config = configured(tmp_path / "runs", tmp_path / "datasets" if fresh_data else datasets)
    assert survival.run(config, tmp_path / "said", sabotage) == -signal.SIGKILL, (tmp_path / "said").read_text()
    if moment == "the record, just in place":
        assert reproducible(only_record(tmp_path / "runs")) == expected
        assert survival.run(config, tmp_path / "said") == 0
        return
    check_it_recovers(tmp_path, config, expected)


@pytest.mark.parametrize("draw", range(3))
def test_killed_at_a_random_moment_three_times_in_a_row(draw, tmp_path, undisturbed):
    expected, datasets, seconds = undisturbed
    config = configured(tmp_path / "runs", datasets)
    moments = random.Random(draw)
    for _ in range(3):
        child = survival.start(config, survival.undisturbed, tmp_path / "said")
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        survival.finish(child)
    check_it_recovers(tmp_path, config, expected)


def ask(number: int):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "sabotage", "step"),
    [
        (signal.SIGTERM, at_call(lra.training.TrainStep, "__call__", 14, ask(signal.SIGTERM)), 14),
        (signal.SIGUSR1, at_call(lra.training.TrainStep, "__call__", 3, ask(signal.SIGUSR1)), 3),
        (signal.SIGUSR2, at_batch(lra.training, 5, ask(signal.SIGUSR2)), 16),
        (signal.SIGTERM, at_batch(lra.experiment, 2, ask(signal.SIGTERM)), 24),
    ],
    ids=["term in a step", "usr1 in a step", "usr2 in a validation", "term in the test"],
)
def test_a_signal_leaves_a_checkpoint_of_that_very_step_and_its_exit_code(
    number, sabotage, step, tmp_path, undisturbed
):
    expected, datasets, _ = undisturbed
    config = configured(tmp_path / "runs", datasets)
    assert survival.run(config, tmp_path / "said", sabotage) == 128 + number
    assert signal.Signals(number).name in (tmp_path / "said").read_text()
    assert Ledger(tmp_path / "runs").read_all() == ([], [])  # asked to stop is not failed
    (path,) = (tmp_path / "runs" / "checkpoints").glob("*.pt")
    assert torch.load(path, weights_only=True)["progress"]["step"] == step
    check_it_recovers(tmp_path, config, expected)


def test_a_signal_during_data_preparation_ends_at_once(tmp_path, undisturbed):
    config = configured(tmp_path / "runs", tmp_path / "datasets")
    assert survival.run(config, tmp_path / "said", at_call(Task, "prepare", 1, ask(signal.SIGTERM))) == 143
    assert not (tmp_path / "runs" / "checkpoints").exists()
    check_it_recovers(tmp_path, config, undisturbed[0])


def test_a_launchers_own_handler_is_called_after_the_checkpoint_and_the_run_goes_on_where_it_returns(
    tmp_path, undisturbed
):
    expected, datasets, _ = undisturbed
    config = configured(tmp_path / "runs", datasets)

    def requeues(number, frame):
        (path,) = (tmp_path / "runs" / "checkpoints").glob("*.pt")
        (tmp_path / "handed_on").write_text(str(torch.load(path, weights_only=True)["progress"]["step"]))

    earlier = signal.signal(signal.SIGUSR2, requeues)  # as submitit does before a job starts
    try:
        sabotage = at_call(lra.training.TrainStep, "__call__", 10, ask(signal.SIGUSR2))
        assert survival.run(config, tmp_path / "said", sabotage) == 0
    finally:
        signal.signal(signal.SIGUSR2, earlier)
    assert (tmp_path / "handed_on").read_text() == "10"
    assert reproducible(only_record(tmp_path / "runs")) == expected


def test_a_spent_budget_ends_the_run_with_its_own_code_and_the_next_command_finishes_it(tmp_path, undisturbed):
    expected, datasets, _ = undisturbed
    config = configured(tmp_path / "runs", datasets)
    assert survival.run(config, tmp_path / "said", budget=1e-9) == BUDGET_SPENT == 75
    assert "the time budget of 1e-09 minutes is spent" in (tmp_path / "said").read_text()
    check_it_recovers(tmp_path, config, expected)


def test_of_two_processes_with_the_same_run_one_works_and_the_other_says_so(tmp_path, undisturbed):
    expected, datasets, _ = undisturbed
    config = configured(tmp_path / "runs", datasets)
    hold, let_go = os.pipe()
    working = survival.start(
        config, at_call(lra.training.TrainStep, "__call__", 2, lambda: os.read(hold, 1)), tmp_path / "first"
    )
    lock = tmp_path / "runs" / "ledger" / f".{expected['run_id']}.lock"
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.01)
    assert survival.run(config, tmp_path / "second") == 1
    assert f"already being worked on by process {working} on" in (tmp_path / "second").read_text()
    os.write(let_go, b"x")
    assert survival.finish(working) == 0
    assert reproducible(only_record(tmp_path / "runs")) == expected


def test_a_checkpoint_of_other_data_is_refused(tmp_path, undisturbed):
    config = configured(tmp_path / "runs", undisturbed[1])
    survival.run(config, tmp_path / "said", at_call(lra.training.TrainStep, "__call__", 14, die))
    (path,) = (tmp_path / "runs" / "checkpoints").glob("*.pt")
    with pytest.raises(ValueError, match=r"belongs to run \w+ on data \w+, not to .* on data changed"):
        load_checkpoint(path, f"{undisturbed[0]['run_id']} on data changed", torch.device("cpu"))
