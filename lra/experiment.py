"""Owns one run from configuration to record: prepare, build, fit, evaluate, measure, record, track."""

import base64
import hashlib
import json
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from data.base import Task
from lra import ranks
from lra.allocator import freed_memory_kept
from lra.compilation import compiled
from lra.display import RunBar, display, say
from lra.distributed import RankFailed, RankLost, World, joined
from lra.efficiency import measure
from lra.evaluation import Counts, evaluate
from lra.gpus import choose_device
from lra.identity import identity_of, run_id_of
from lra.ledger import Ledger, remove_leftovers
from lra.protocol import Protocol
from lra.provenance import describe_occasion
from lra.records import RunRecord, Status
from lra.seeding import derive_seed
from lra.stopping import Stopped, stop
from lra.training import Diverged, Fit, fit

_CHOICES = (
    "task", "attention", "protocol", "seed", "experiment", "job", "tracking", "device", "devices", "num_nodes", "threads",
    "rerun", "data_workers", "budget_minutes", "allow_foreign_targets",
)  # fmt: skip


def train(config: DictConfig) -> float | None:
    """The default job. Returns the test accuracy; a run that the ledger holds already is not repeated. With `devices` or
    `num_nodes` above 1 this process is one rank of the run (`lra.distributed`), or starts the ranks and waits for them;
    ranks other than 0 return None."""
    run_id = run_id_of(identity_of(config))
    ledger = Ledger(config.paths.runs)
    title = f"{config.names.task} / {config.names.attention} / seed {config.seed}"
    stop.point()
    place = ranks.place_of(config)
    if place is None:
        if config.rerun or not _is_finished(ledger.find(run_id)):
            ranks.start_here(config)
            return _tell(ledger, run_id, title)
        return _tell(ledger, run_id, title, before=True)
    torch.set_num_threads(config.threads)
    device = choose_device(config.device, place)
    with freed_memory_kept() as kept, joined(place, device) as world:
        if not world.leads:
            _follow(Work(config, device, ledger.checkpoint(run_id), world), run_id)
        with ledger.claim(run_id):
            if not config.rerun and _is_finished(ledger.find(run_id)):
                return _tell(ledger, run_id, title, before=True)
            _lead(config, device, ledger, world, title, kept)
        return _tell(ledger, run_id, title)
    return None


def _is_finished(record: RunRecord | None) -> bool:
    return record is not None and record.status == "finished"


def _tell(ledger: Ledger, run_id: str, title: str, *, before: bool = False) -> float:
    """Say what came out, `before` this command or now, where it is this process that says it."""
    record = ledger.find(run_id)
    assert record is not None
    accuracy = float(record.result["test_best"]["accuracy"])
    note = f"{title}: test accuracy {accuracy:.4f}"
    display.advance_grid(f"{title}: already in the ledger" if before else note)
    if display.in_grid or not ranks.speaks():
        return accuracy
    if before:
        say(f"{title}: finished before, test accuracy {accuracy:.4f} (run {run_id}); rerun=true repeats it")
    else:
        say(f"{note} (run {run_id}, {ledger.path(run_id)})")
    return accuracy


def _lead(
    config: DictConfig, device: torch.device, ledger: Ledger, world: World, title: str, freed_memory_is_kept: bool
) -> None:
    """The run, in the one process that holds its claim."""
    identity = identity_of(config)
    run_id = run_id_of(identity)
    record = _blank_record(config, identity, run_id, device)
    record.provenance.update(ranks=world.describe(), keeps_freed_memory=freed_memory_is_kept)
    checkpoint = ledger.checkpoint(run_id)
    for target in (checkpoint, ledger.path(run_id)):
        remove_leftovers(target)
    if config.rerun:
        checkpoint.unlink(missing_ok=True)
    work = Work(config, device, checkpoint, world)
    with instantiate(config.tracking)(record=record, runs=Path(config.paths.runs)) as tracker:
        _run_and_record(work, record, tracker, ledger, title)


def _follow(work: "Work", run_id: str) -> None:
    """A rank other than 0: train with rank 0, and nothing else. Ends with LeaderEnded."""
    work.world.follow()  # rank 0 has prepared the data
    data = work.task.prepare().as_dict()
    work.agree(run_id, data)
    with stop.deferred():
        work.fit(f"{run_id} on data {_digest(data['sha256'])}")
        work.world.await_end()


def build_model(config: DictConfig, task: Task) -> nn.Module:
    """The shared backbone with config.attention in its slot; the task's facts are handed over here and nowhere else."""
    return instantiate(config.model)(
        instantiate(config.attention),
        seed=derive_seed(config.seed, "model"),
        vocab_size=task.vocab_size,
        num_classes=task.num_classes,
        num_sequences=task.num_sequences,
        max_len=task.max_len,
    )


class Work:
    """What a run is made of, built before any data is touched: an impossible configuration fails at once."""

    def __init__(self, config: DictConfig, device: torch.device, checkpoint: Path, world: World) -> None:
        self.protocol: Protocol = instantiate(config.protocol)
        if self.protocol.batch_size < world.size:
            raise ValueError(
                f"protocol.batch_size={self.protocol.batch_size} gives no example to some of {world.size} ranks "
                f"(devices={config.devices} num_nodes={config.num_nodes}); use at most {self.protocol.batch_size}"
            )
        self.world = world
        self.task: Task = instantiate(config.task)
        self.compile_mode = config.compile
        self.model = compiled(build_model(config, self.task).to(device), self.compile_mode)
        if config.resident:
            self.task.hold_on(device)
        self.seed, self.precision = config.seed, config.precision
        self.device, self.checkpoint = device, checkpoint

    def agree(self, run_id: str, data: dict[str, Any]) -> None:
        """Raises ValueError where the ranks would not do the same run on the same data."""
        facts = {"run": run_id, "data": _digest(data["sha256"])}
        self.world.compare(facts, "start all ranks with the same command, the same files and the same paths.datasets")

    def fit(self, identity: str, **callbacks: Callable[..., None]) -> Fit:
        """`fit`, in this rank. `callbacks`: on_step, on_validation."""
        return fit(
            self.model,
            self.task,
            self.protocol,
            seed=self.seed,
            device=self.device,
            precision=self.precision,
            checkpoint=self.checkpoint,
            identity=identity,
            world=self.world,
            stop=stop,
            **callbacks,
        )


def _run_and_record(work: Work, record: RunRecord, tracker: Any, ledger: Ledger, title: str) -> RunRecord:
    """Every way that a run can end becomes a record; all but success are raised again."""
    try:
        with display.run(title, work.protocol.num_steps) as bar:
            started = perf_counter()
            record = replace(record, data=work.task.prepare().as_dict())
            work.world.follow()
            work.agree(record.run_id, record.data)
            record.provenance["seconds"] = {"prepare": perf_counter() - started}
            with stop.deferred():
                tracker.start(record)
                record = _run(work, record, tracker, bar)
                ledger.write(record)
                work.checkpoint.unlink(missing_ok=True)
                tracker.finish(record)
    except (Stopped, RankLost) as stopped:  # no result of this cell: it can go on
        display.advance_grid(f"{title}: {stopped}")
        raise
    except Exception as error:
        # without data nothing ran: that is no result of this cell; and a finished run stays one, whatever came after
        if record.data and record.status != "finished":
            text = "".join(traceback.format_exception_only(error)).strip()
            record = replace(record, status=_status_of(error), error=text)
            with suppress(OSError):
                ledger.write(record)
                tracker.finish(record)
        display.advance_grid(f"{title}: {_status_of(error)}")
        raise
    return record


def _status_of(error: Exception) -> Status:
    if isinstance(error, Diverged):
        return "diverged"
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "oom"
    if isinstance(error, RankFailed) and "OutOfMemoryError" in str(error):
        return "oom"
    return "failed"


def _run(work: Work, record: RunRecord, tracker: Any, bar: RunBar) -> RunRecord:
    started = perf_counter()
    fitted = work.fit(
        f"{record.run_id} on data {_digest(record.data['sha256'])}",
        on_step=lambda step, loss: _show_step(bar, tracker, step, loss),
        on_validation=lambda step, counts: tracker.log(
            {"val/accuracy": counts.accuracy, "val/loss": counts.loss}, step
        ),
    )
    trained = perf_counter()
    result = _test(work, fitted)
    tested = perf_counter()
    stop.point()
    where = {"seed": work.seed, "device": work.device, "precision": work.precision}
    # of one device, also where several trained
    efficiency = measure(work.model, work.task, work.protocol, compile_mode=work.compile_mode, **where)
    seconds = {**record.provenance["seconds"], "fit": trained - started, "test": tested - trained}
    provenance = {**record.provenance, "seconds": seconds, "resumed_at_step": fitted.first_step}
    return replace(record, status="finished", result=result, efficiency=efficiency, provenance=provenance)


def _show_step(bar: RunBar, tracker: Any, step: int, loss: float | None) -> None:
    if loss is None:
        bar.update(step)
        return
    bar.update(step, f"loss {loss:.3f}")
    tracker.log({"train/loss": loss}, step)


def _test(work: Work, fitted: Fit) -> dict[str, Any]:
    """The final weights and the best validation's, each on the whole test split. Leaves the best ones in the model."""
    model, task, protocol = work.model, work.task, work.protocol

    def count() -> Counts:
        batches = task.batches("test", protocol.eval_batch_size, pad_to_max_len=protocol.pad_to_max_len)
        return evaluate(model, stop.between(batches), device=work.device, precision=work.precision)

    final = count()
    progress = fitted.progress
    model.load_state_dict(fitted.best_weights)
    # the same weights give the same counts; -1: no validation was kept
    best = final if progress.best_step in (-1, progress.step) else count()
    return {
        "steps": progress.step,
        "epochs": progress.examples_seen / len(task.split("train")),
        "best_step": progress.best_step,
        "train_curve": [list(entry) for entry in progress.train_curve],
        "val_curve": [list(entry) for entry in progress.val_curve],
        "val_best_accuracy": progress.best_accuracy,
        "test_best": _as_dict(best),
        "test_final": _as_dict(final),
        "parameters": sum(p.numel() for p in model.parameters()),
        "majority_accuracy": float(np.bincount(task.split("test").labels).max() / final.total),
    }


def _as_dict(counts: Counts) -> dict[str, Any]:
    """`right` is one bit per test example in order (numpy.packbits, base64): what paired tests between runs need."""
    bits = base64.b64encode(np.packbits(counts.right.numpy()).tobytes()).decode()
    return {
        "correct": counts.correct, "total": counts.total, "accuracy": counts.accuracy, "loss": counts.loss, "right": bits,
    }  # fmt: skip


def _digest(node: Any) -> str:
    return hashlib.sha256(json.dumps(node, sort_keys=True).encode()).hexdigest()[:12]


def _blank_record(config: DictConfig, identity: dict[str, Any], run_id: str, device: torch.device) -> RunRecord:
    typed = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return RunRecord(
        run_id=run_id,
        status="failed",
        experiment=config.experiment,
        task=config.names.task,
        attention=config.names.attention,
        protocol=config.names.protocol,
        seed=config.seed,
        overrides=[item for item in typed if item.split("=")[0] not in _CHOICES and not item.startswith("paths.")],
        identity=identity,
        data={},
        provenance=describe_occasion(device),
    )
