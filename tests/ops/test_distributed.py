"""One run over several ranks: the result of one device, one end for all, and the same checkpoint. Two gloo processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lra.training
from lra import ranks
from lra.distributed import World, joined
from lra.ledger import Ledger
from lra.ranks import Place, place_of
from lra.stopping import BUDGET_SPENT, stop
from tests.conftest import ROOT, CountingTask
from tests.lra.test_training import PROTOCOL, Bag, run_fit
from tests.ops import survival
from tests.ops.survival import SMALL, at_batch, at_call, configured, die, only_record, reproducible

pytestmark = pytest.mark.timeout(120)
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEP = (lra.training.TrainStep, "__call__")


def settings_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells each process that it starts."""
    values = (str(rank), str(size), str(rank), str(size), "127.0.0.1", str(port))
    return dict(zip(TORCHRUN, values, strict=True))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_ranks(work: Callable[[int], int], size: int = 2) -> list[int]:
    """Fork `size` ranks; each ends with what `work(rank)` returns. Their exit codes, minus the signal that killed one."""
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.environ.update(settings_of(rank, size, port))
                code = work(rank)
            finally:
                os._exit(code)
        children.append(child)
    return [survival.finish(child) for child in children]


def run_in_ranks(tmp_path: Path, config, sabotage: dict[int, Callable[[], None]] | None = None) -> list[int]:
    """The whole run, as `python run.py` in each rank; what rank r says is in `said<r>`."""
    sabotages = sabotage or {}

    def work(rank: int) -> int:
        return survival.run(config, tmp_path / f"said{rank}", sabotages.get(rank, survival.undisturbed))

    return in_ranks(work)


def said(tmp_path: Path, rank: int) -> str:
    return (tmp_path / f"said{rank}").read_text()


PLAIN = replace(PROTOCOL, num_steps=30, gradient_clip="none")
CASES = {
    "even shares": PLAIN,
    "an odd batch": replace(PLAIN, batch_size=7),
    "micro batches": replace(PLAIN, batch_size=10, micro_batches=2),
    "a clipped norm": replace(PLAIN, batch_size=9, gradient_clip="norm", gradient_clip_limit=0.05),
    "clipped values": replace(PLAIN, batch_size=5, gradient_clip="value", gradient_clip_limit=0.01),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_end_with_the_weights_losses_and_counts_of_one(case, tmp_path):
    """Tolerance: 1e-5 of the weights, which are of order 1; sums in another order differ by 1e-7 and AdamW carries on."""
    protocol = CASES[case]

    def build() -> Bag:
        model = Bag()
        model.dropout.p = 0.0
        return model

    alone, expected = run_fit(CountingTask(), protocol, model=build())

    def work(rank: int) -> int:
        with joined(Place(rank, 2, rank), torch.device("cpu")) as world:
            model, fitted = run_fit(CountingTask(), protocol, model=build(), world=world)
            torch.save([model.state_dict(), vars(fitted.progress)], tmp_path / f"{rank}.pt")
        return 0

    assert in_ranks(work) == [0, 0]
    (weights, progress), (others, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in alone.state_dict().items():
        assert torch.equal(weights[name], others[name])
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)
    for (step, loss), (same_step, whole) in zip(progress["train_curve"], expected.progress.train_curve, strict=True):
        assert step == same_step and loss == pytest.approx(whole, abs=1e-5)
    assert [entry[:2] for entry in progress["val_curve"]] == [entry[:2] for entry in expected.progress.val_curve]
    assert progress["examples_seen"] == expected.progress.examples_seen


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_shares_hold_every_example_once_and_in_order(size):
    batch = next(CountingTask().batches("train", 10, seed=0))
    worlds = [World(Place(rank, size, rank)) for rank in range(size)]
    shares = [world.share(batch) for world in worlds]
    assert torch.equal(torch.cat([share.tokens for share in shares]), batch.tokens)
    assert torch.equal(torch.cat([share.labels for share in shares]), batch.labels)
    assert torch.equal(torch.cat([share.key_padding_mask for share in shares]), batch.key_padding_mask)
    assert {len(share.labels) for share in shares} <= {10 // size, -(-10 // size)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The record of the run in one process, without dropout, and the data."""
    folder = tmp_path_factory.mktemp("alone")
    config = configured(folder / "runs", folder / "datasets", "model.dropout=0")
    survival.train(config)
    return only_record(folder / "runs"), folder / "datasets"


@pytest.fixture(scope="module")
def in_two(tmp_path_factory, undisturbed):
    """The record of two ranks that nobody hurts, with dropout."""
    folder = tmp_path_factory.mktemp("two")
    config = configured(folder / "runs", undisturbed[1], "devices=2")
    assert run_in_ranks(folder, config) == [0, 0], said(folder, 0) + said(folder, 1)
    return reproducible(only_record(folder / "runs"))


def test_the_record_of_two_ranks_is_that_of_one_and_says_how_many_there_were(tmp_path, undisturbed):
    alone, datasets = undisturbed
    config = configured(tmp_path / "runs", datasets, "model.dropout=0", "devices=2")
    with survival.nothing_left_behind(tmp_path / "runs"):
        assert run_in_ranks(tmp_path, config) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert "test accuracy" in said(tmp_path, 0) and said(tmp_path, 1) == ""
    record = only_record(tmp_path / "runs")
    assert record.run_id == alone.run_id
    assert record.result["test_best"]["right"] == alone.result["test_best"]["right"]
    for ours, theirs in zip(record.result["train_curve"], alone.result["train_curve"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert record.provenance["ranks"] == {
        "world_size": 2, "devices": 2, "num_nodes": 1, "backend": "gloo", "efficiency_devices": 1,
    }  # fmt: skip
    assert alone.provenance["ranks"]["world_size"] == 1
    again = run_in_ranks(tmp_path, config)
    assert again == [0, 0] and "finished before" in said(tmp_path, 0) and said(tmp_path, 1) == ""


def term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


STOPS = {
    "rank 1 in a step": ({1: at_call(*STEP, 14, term)}, 14, 143),
    "both in a step": ({0: at_call(*STEP, 14, term), 1: at_call(*STEP, 14, term)}, 14, 143),
    "rank 0 in a validation": ({0: at_batch(lra.training, 5, term)}, 16, 143),
    "rank 1's time is spent": ({1: at_call(*STEP, 14, lambda: stop.adopt(BUDGET_SPENT))}, 14, BUDGET_SPENT),
}


@pytest.mark.parametrize("where", STOPS)
def test_all_ranks_stop_at_one_step_and_go_on_to_the_same_record(where, tmp_path, undisturbed, in_two):
    sabotage, step, code = STOPS[where]
    config = configured(tmp_path / "runs", undisturbed[1], "devices=2")
    assert run_in_ranks(tmp_path, config, sabotage) == [code, code], said(tmp_path, 0) + said(tmp_path, 1)
    assert {143: "stopped by SIGTERM", 75: "is spent"}[code] in said(tmp_path, 0) and said(tmp_path, 1) == ""
    assert Ledger(tmp_path / "runs").read_all() == ([], [])
    (path,) = (tmp_path / "runs" / "checkpoints").glob("*.pt")
    assert torch.load(path, weights_only=True)["progress"]["step"] == step
    assert run_in_ranks(tmp_path, config) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert (
        reproducible(only_record(tmp_path / "runs")) == in_two
    )  # with dropout: each rank's draws are those of its step


def fail() -> None:
    raise RuntimeError("a cosmic ray")


def test_a_failing_rank_ends_all_with_its_reason_in_the_record(tmp_path, undisturbed):
    config = configured(tmp_path / "runs", undisturbed[1], "devices=2")
    assert run_in_ranks(tmp_path, config, {1: at_call(*STEP, 14, fail)}) == [1, 1]
    assert "rank 1 of 2: " in said(tmp_path, 1) and "a cosmic ray" in said(tmp_path, 1)
    assert "rank 1 of 2 failed: RuntimeError: a cosmic ray" in said(tmp_path, 0)
    record = only_record(tmp_path / "runs")
    assert record.status == "failed" and "rank 1 of 2 failed" in str(record.error)


def test_when_rank_0_fails_it_says_why_and_the_others_leave_in_silence(tmp_path, undisturbed):
    config = configured(tmp_path / "runs", undisturbed[1], "devices=2")
    assert run_in_ranks(tmp_path, config, {0: at_batch(lra.training, 5, fail)}) == [1, 1]
    assert "a cosmic ray" in said(tmp_path, 0) and said(tmp_path, 1) == ""
    assert only_record(tmp_path / "runs").status == "failed"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_and_costs_what_was_done_since_the_last_checkpoint(rank, tmp_path, undisturbed, in_two):
    config = configured(tmp_path / "runs", undisturbed[1], "devices=2")
    codes = run_in_ranks(tmp_path, config, {rank: at_call(*STEP, 14, die)})
    assert (codes[rank], codes[1 - rank]) == (247, 1)  # 247: -9 as an exit code of the process between
    assert "another rank of this run is gone" in said(tmp_path, 1 - rank)
    assert Ledger(tmp_path / "runs").read_all() == ([], [])
    assert run_in_ranks(tmp_path, config) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert reproducible(only_record(tmp_path / "runs")) == in_two


def test_ranks_that_do_not_see_the_same_checkpoint_say_so(tmp_path, undisturbed):
    here, there = (configured(tmp_path / folder, undisturbed[1], "devices=2") for folder in ("here", "there"))
    assert run_in_ranks(tmp_path, here, {1: at_call(*STEP, 14, term)}) == [143, 143]

    def work(rank: int) -> int:
        return survival.run((here, there)[rank], tmp_path / f"said{rank}")

    assert in_ranks(work) == [1, 1]
    assert "checkpoint of step: 14 here, 0 on rank 1; paths.runs must be one folder" in said(tmp_path, 0)


def test_more_ranks_than_examples_in_a_batch_are_refused(tmp_path, undisturbed):
    config = configured(tmp_path / "runs", undisturbed[1], "devices=2", "per_task.listops.batch_size=1")
    assert run_in_ranks(tmp_path, config) == [1, 1]
    assert "protocol.batch_size=1 gives no example to some of 2 ranks" in said(tmp_path, 0)


def placed(monkeypatch, *overrides: str, **environment: str) -> Place | None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return place_of(configured(Path("/runs"), Path("/datasets"), *overrides))


def test_a_process_knows_its_place(monkeypatch):
    assert placed(monkeypatch) == Place(0, 1, 0)
    assert placed(monkeypatch, "devices=2") is None  # to be started
    four = settings_of(3, 4, 1) | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert placed(monkeypatch, "devices=2", "num_nodes=2", **four) == Place(3, 4, 1, 2)


def test_another_number_of_processes_than_asked_for_is_refused(monkeypatch):
    four = settings_of(3, 4, 1) | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match=r"WORLD_SIZE=4.*devices=1 num_nodes=1 asks for 1.*give devices=2 num_nodes=2"):
        placed(monkeypatch, **four)
    with pytest.raises(
        ValueError, match=r"devices=4 num_nodes=1 asks for 4, 4 on each node; give devices=2 num_nodes=2"
    ):
        placed(monkeypatch, "devices=4", **four)


def test_several_nodes_that_nobody_started_are_answered_with_the_commands(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "task=text", "devices=4", "num_nodes=2"])
    with pytest.raises(ValueError, match="num_nodes=2") as caught:
        placed(monkeypatch, "devices=4", "num_nodes=2")
    text = str(caught.value)
    assert "torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=<host>:29400" in text
    assert "run.py task=text devices=4 num_nodes=2" in text
    assert "hydra.launcher.nodes=2 hydra.launcher.tasks_per_node=4 hydra.launcher.gres=gpu:4" in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("devices=2",), None),
        (("devices=2", "num_nodes=2"), "torchrun --nnodes=2"),
        (("devices=2", "hydra/launcher=joblib"), "with this launcher a run has one device"),
    ],
)
def test_a_grid_of_such_runs_goes_one_after_another_or_through_slurm(overrides, expected, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = configured(Path("/runs"), Path("/datasets"), *overrides)
    complaints = ranks.complaints(config)
    assert (complaints == []) if expected is None else (expected in complaints[0])


def test_the_number_of_devices_is_no_part_of_a_runs_identity():
    from lra.cells import _ELSEWHERE
    from lra.identity import identity_of, run_id_of

    alone, four = (configured(Path("/runs"), Path("/datasets"), *more) for more in ((), ("devices=4", "num_nodes=2")))
    assert run_id_of(identity_of(alone)) == run_id_of(identity_of(four))
    assert {"devices", "num_nodes"} <= set(_ELSEWHERE)


def test_a_job_that_trains_nothing_refuses_devices(run_cli):
    done = run_cli("job=status", "devices=2")
    assert done.returncode == 1 and "several devices are for job=train alone" in done.stderr


def test_one_command_starts_its_ranks_hands_a_signal_on_and_goes_on_later(tmp_path, run_cli, undisturbed):
    """The whole way, through torchrun, for a grid of two cells."""
    more = (
        "-m", *SMALL, "devices=2", "model.dropout=0", "seed=0,1", f"paths.datasets={undisturbed[1]}",
        "per_task.listops.num_steps=400", "per_task.listops.eval_every=400", "protocol.checkpoint_every=10",
    )  # fmt: skip
    runs = tmp_path / "runs"
    environment = {**os.environ, "LRA_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *more], env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        limit = time.monotonic() + 60
        while not list(runs.glob("checkpoints/*.pt")) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=60)
    assert process.returncode == 143, text
    assert "stopped by SIGTERM: 2 of 2 runs are left; type the same command again to go on" in text
    assert "Traceback" not in text and list(runs.glob("checkpoints/*.pt"))
    done = run_cli(*more)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (runs / "ledger").glob("*.json")]
    assert sorted(record["seed"] for record in records) == [0, 1]
    assert {record["provenance"]["ranks"]["world_size"] for record in records} == {2}
    assert max(record["provenance"]["resumed_at_step"] for record in records) > 0
    assert done.stderr.count("test accuracy") == 2 and "OMP_NUM_THREADS" not in done.stderr
