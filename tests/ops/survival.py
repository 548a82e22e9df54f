"""Owns the way the tests hurt a run: a child process that does one small run and is killed, stopped or starved on the way."""

import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lra.cli import explained
from lra.experiment import train
from lra.ledger import Ledger
from lra.records import RunRecord
from lra.stopping import stop
from tests.conftest import ROOT

# ListOps with one small layer: a third of a second on a quiet core
SMALL = (
    "task=listops", "attention=mean_pool", "threads=1", "tracking=disabled", "device=cpu", "model.num_layers=1",
    "model.dim=16", "model.mlp_dim=16", "per_task.listops.num_train=60", "per_task.listops.num_val=30",
    "per_task.listops.num_test=30", "per_task.listops.max_length=40", "per_task.listops.max_len=40",
    "per_task.listops.num_steps=24", "per_task.listops.warmup_steps=5", "per_task.listops.eval_every=8",
    "per_task.listops.batch_size=8", "protocol.checkpoint_every=3", "protocol.log_every=5", "protocol.eval_batch_size=10",
    "protocol.measure_warmup=0", "protocol.measure_repetitions=1",
)  # fmt: skip


def configured(runs: Path, datasets: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        places = (f"paths.runs={runs}", f"paths.datasets={datasets}")
        config = compose("config", overrides=[*SMALL, *places, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


def start(config: DictConfig, sabotage: Callable[[], None], said: Path, budget: float | None = None) -> int:
    """Fork; the child does the run and writes to `said` what it has to say. Returns its process number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        stop.listen(budget)
        sabotage()
        code = explained(lambda: train(config), ROOT / "conf")
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    """The child's exit code; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def undisturbed() -> None:
    pass


def run(config: DictConfig, said: Path, sabotage: Callable[[], None] = undisturbed, budget: float | None = None) -> int:
    return finish(start(config, sabotage, said, budget))


def only_record(runs: Path) -> RunRecord:
    (record,), damaged = Ledger(runs).read_all()
    assert not damaged
    return record


def reproducible(record: RunRecord) -> dict[str, Any]:
    """A record without what is measured or describes the occasion: this must be the same bit by bit."""
    return {key: value for key, value in asdict(record).items() if key not in ("efficiency", "provenance")}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def nothing_left_behind(runs: Path):
    """After the block no temporary file and no checkpoint lies in the results folder."""
    yield
    litter = [path.name for path in runs.rglob(".*") if path.is_file() and path.suffix != ".lock"]
    assert litter == [] and list((runs / "checkpoints").glob("*")) == []


def at_call(owner: Any, name: str, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Sabotage: `act` just before call `number` (from 1) of `owner.name`."""

    def install() -> None:
        plain, calls = getattr(owner, name), [0]

        def counting(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                act()
            return plain(*arguments, **named)

        setattr(owner, name, counting)

    return install


def at_batch(owner: Any, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Sabotage: `act` before batch `number` of all that `owner.evaluate` is given."""

    def install() -> None:
        plain, seen = owner.evaluate, [0]

        def counting(batches):
            for batch in batches:
                seen[0] += 1
                if seen[0] == number:
                    act()
                yield batch

        owner.evaluate = lambda model, batches, **named: plain(model, counting(batches), **named)

    return install


def at_write(pattern: str, number: int, act: Callable[[], None], *, renamed: bool = False) -> Callable[[], None]:
    """Sabotage: `act` when a file whose path matches is written but not yet flushed, or (`renamed`) just in its place."""

    def install() -> None:
        fsync, replace, seen = os.fsync, os.replace, [0]

        def is_it(path: str) -> bool:
            seen[0] += re.search(pattern, path) is not None
            return seen[0] == number and re.search(pattern, path) is not None

        def watched_fsync(handle: int) -> None:
            if not renamed and is_it(os.readlink(f"/proc/self/fd/{handle}")):
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
                act()
            fsync(handle)

        def watched_replace(source: Any, target: Any) -> None:
            replace(source, target)
            if renamed and is_it(str(target)):
                act()

        os.fsync, os.replace = watched_fsync, watched_replace

    return install
