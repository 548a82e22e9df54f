"""Owns which rank of how many this process is, and the start of the ranks of one run on this machine through torchrun.

A rank is one process with one device. This file imports torch only where it starts ranks: lra.cli needs the rest.
"""

import importlib
import importlib.util
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lra.stopping import BUDGET_SPENT, SIGNALS, stop

_RUN = Path(__file__).resolve().parents[1] / "run.py"
_STARTED_BY = "LRA_RANKS_STARTED_BY"  # the process number of the command that started these ranks itself
_HEARD = (*SIGNALS, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # torchrun takes all of these over while it works
_STOPS = (BUDGET_SPENT, *(128 + number for number in SIGNALS))
_SECONDS_TO_STOP = 110  # for a checkpoint after a signal; SLURM warns 120 s before its time limit


class RanksFailed(RuntimeError):
    """A rank that this command started ended with an error. The rank has said which."""


@dataclass(frozen=True)
class Place:
    """This process among the `size` processes of its run, and the device it takes among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    num_nodes: int = 1


def place_of(config: DictConfig) -> Place | None:
    """None: this command has to start the ranks (`start_here`). Raises ValueError where the number of processes is not
    devices x num_nodes, or where nobody has started the processes of the other nodes."""
    devices, num_nodes = config.devices, config.num_nodes
    if "WORLD_SIZE" not in os.environ:
        _export_submitits()
    found = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if all(found):
        rank, size, local_rank = (int(value) for value in found if value)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
        if size != devices * num_nodes or here != devices:
            raise ValueError(
                f"{size} processes were started for this run, {here} of them here (WORLD_SIZE={size}, "
                f"LOCAL_WORLD_SIZE={here}), and devices={devices} num_nodes={num_nodes} asks for {devices * num_nodes}, "
                f"{devices} on each node; give devices={here} num_nodes={max(size // here, 1)}, or start as many "
                "processes as you ask for (torchrun --nnodes=<num_nodes> --nproc-per-node=<devices>)"
            )
        return Place(rank, size, local_rank, num_nodes)
    if num_nodes > 1:
        raise ValueError(_how_to_start(devices, num_nodes))
    return Place() if devices == 1 else None


def speaks() -> bool:
    """Whether this process tells a person how a run ended: the command that started the ranks, if there is one, else
    rank 0. An error is told by every rank that it happens to."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get(_STARTED_BY) != str(os.getppid())


def who() -> str:
    """ "rank 1 of 4: " in front of a message; nothing where the process is alone."""
    size = os.environ.get("WORLD_SIZE", "1")
    return "" if size == "1" else f"rank {os.environ.get('RANK', '0')} of {size}: "


def start_here(config: DictConfig) -> None:
    """Start `devices` ranks of this very run on this machine, as `torchrun --standalone` does, and wait for them. Raises
    Stopped where they were asked to stop, RanksFailed where one failed, ValueError where there are too few GPUs."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    devices, found = config.devices, torch.cuda.device_count()
    if config.device != "cpu" and torch.cuda.is_available() and devices > found:
        raise ValueError(f"devices={devices}, and torch finds {found} CUDA device(s) here; give devices={found}")
    options = [
        "--standalone", f"--nproc-per-node={devices}", f"--shutdown-timeout={_SECONDS_TO_STOP}",
        f"--signals-to-handle={','.join(number.name for number in _HEARD)}",
    ]  # fmt: skip
    while True:
        heard = 0
        with _as_parent(config.threads):
            try:
                run(parse_args([*options, str(_RUN), *_arguments()]))
                return
            except SignalException as error:
                heard = error.sigval
            except ChildFailedError as error:
                failed = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if heard == signal.SIGINT:
            raise KeyboardInterrupt
        if heard in (signal.SIGHUP, signal.SIGQUIT):
            sys.exit(128 + heard)
        code = 128 + heard if heard else _verdict(failed, devices)
        stop.adopt(code)
        stop.point()  # raises Stopped; where a launcher's own handler returns, the ranks go on from their checkpoint


def _verdict(failed: dict[int, int], devices: int) -> int:
    """The exit code of ranks that were asked to stop. Raises RanksFailed for any other end."""
    for rank, code in sorted(failed.items()):
        if code not in _STOPS and code != -signal.SIGTERM:  # that is how torchrun ends the others
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise RanksFailed(
                f"rank {rank} of {devices} {how}; its message is above. Type the same command again to go on from the "
                "last checkpoint."
            )
    return max((code for code in failed.values() if code in _STOPS), default=128 + signal.SIGTERM)


@contextmanager
def _as_parent(threads: int) -> Iterator[None]:
    """The environment that the ranks inherit; torchrun's own handlers and log lines end with the block."""
    settings = {_STARTED_BY: str(os.getpid()), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    settings["TORCH_CPP_LOG_LEVEL"] = os.environ.get(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # no stack of C++ when a rank is lost
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        settings["TTY_COMPATIBLE"] = "0"  # the grid's bar is drawn here: no bar of the run's own
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in _HEARD}
    os.environ.update(settings)
    logging.disable(logging.CRITICAL)  # the ranks speak for themselves, and so does this file
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _arguments() -> list[str]:
    """The command line that means this run alone, also where it is a cell of a grid."""
    hydra = HydraConfig.get()
    folders = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    return [*folders, *hydra.overrides.hydra, *hydra.overrides.task, "hydra.mode=RUN"]


def complaints(config: DictConfig) -> list[str]:
    """What stands in the way of a grid whose runs take several ranks each."""
    devices, num_nodes, launcher = config.devices, config.num_nodes, config.hydra.launcher
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return [
            "torchrun starts one run, not a grid: give one cell, or start the grid without torchrun (devices=<number>)"
        ]
    if devices * num_nodes == 1:
        return []
    target = str(launcher._target_)
    if "BasicLauncher" in target:
        return [_how_to_start(devices, num_nodes)] if num_nodes > 1 else []
    if "submitit" not in target:
        return [
            f"devices={devices} num_nodes={num_nodes}: with this launcher a run has one device; use hydra/launcher=basic "
            "(one run after another on this machine) or hydra/launcher=submitit_slurm"
        ]
    asked = (launcher.nodes, launcher.tasks_per_node)
    if asked != (num_nodes, devices) and (num_nodes > 1 or asked != (1, 1)):
        return [
            f"devices={devices} num_nodes={num_nodes}, and the jobs would have hydra.launcher.nodes={asked[0]} "
            f"hydra.launcher.tasks_per_node={asked[1]}; give hydra.launcher.nodes={num_nodes} "
            f"hydra.launcher.tasks_per_node={devices}"
        ]
    return []


def _export_submitits() -> None:
    """In a job of submitit with several tasks: name them as torchrun would."""
    if "SUBMITIT_EXECUTOR" not in os.environ or importlib.util.find_spec("submitit") is None:
        return
    helpers = importlib.import_module("submitit.helpers")  # requirements/slurm.txt, so not imported by name
    tasks = helpers.TorchDistributedEnvironment()
    if tasks.world_size > 1:
        tasks.export(set_cuda_visible_devices=False)  # a rank chooses among all that it sees


def _how_to_start(devices: int, num_nodes: int) -> str:
    words = [item for item in sys.argv[1:] if item not in ("-m", "--multirun")]
    program, typed = Path(sys.argv[0]).name, shlex.join(words)
    return (
        f"num_nodes={num_nodes}: a run over several nodes has to be started on each of them. Type on each node, the first "
        "of them being <host>, with results and data in folders that all of them share:\n"
        f"  torchrun --nnodes={num_nodes} --nproc-per-node={devices} --rdzv-backend=c10d --rdzv-endpoint=<host>:29400 "
        f"--rdzv-id=lra --max-restarts=0 {program} {typed}\n"
        "or let SLURM start them:\n"
        f"  python {program} -m {typed} hydra/launcher=submitit_slurm hydra.launcher.nodes={num_nodes} "
        f"hydra.launcher.tasks_per_node={devices} hydra.launcher.gres=gpu:{devices}"
    )
