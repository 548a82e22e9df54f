"""Owns all that touches wandb: one run per cell, its metrics, and the tables `runs`, `accuracy`, `throughput`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pandas as pd

from lra.records import RunRecord

RUNS_COLUMNS = (
    "run_id", "experiment", "task", "dataset", "attention", "protocol", "seed", "status", "test_accuracy",
    "val_accuracy", "test_loss", "steps", "parameters", "train_examples_per_second", "commit", "hardware",
)  # fmt: skip
ACCURACY_COLUMNS = ("task", "dataset", "attention", "protocol", "seed", "test_accuracy", "correct", "total", "run_id")
THROUGHPUT_COLUMNS = (
    "task", "attention", "protocol", "seed", "length", "batch_size", "train_examples_per_second",
    "train_steps_per_second", "train_peak_memory_bytes", "inference_examples_per_second",
    "inference_peak_memory_bytes", "parameters", "hardware", "run_id",
)  # fmt: skip
TABLES = {"runs": RUNS_COLUMNS, "accuracy": ACCURACY_COLUMNS, "throughput": THROUGHPUT_COLUMNS}


class Tracker:
    """Mirrors one run to wandb. `offline` writes to `<runs>/wandb` and opens no connection; `disabled` does nothing."""

    def __init__(
        self,
        *,
        mode: Literal["offline", "online", "disabled"],
        project: str,
        entity: str | None,
        record: RunRecord,
        runs: Path,
    ) -> None:
        if mode not in ("offline", "online", "disabled"):
            raise ValueError(f"unknown tracking.mode={mode!r}; choose offline, online or disabled")
        self.mode, self.project, self.entity, self.runs = mode, project, entity, runs
        self._run_id = record.run_id
        self._run: Any = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)
            self._run = None

    def start(self, record: RunRecord) -> None:
        """Open the wandb run. Online without a key fails here, before any training, and says what to do."""
        if self.mode == "disabled":
            return
        self._run = open_run(
            runs=self.runs,
            mode=self.mode,
            project=self.project,
            entity=self.entity,
            id=record.run_id,
            name=f"{record.task}-{record.label}-s{record.seed}",
            group=record.experiment or "single runs",
            job_type="train",
            tags=_tags(record),
            config={**record.identity, "names": _names(record), "data": record.data, "provenance": record.provenance},
        )
        self._run.define_metric("trainer/step")
        self._run.define_metric("*", step_metric="trainer/step")

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self._run is not None:
            self._run.log({**metrics, "trainer/step": step})

    def finish(self, record: RunRecord) -> None:
        """Summary metrics and one row in each table; a dashboard joins the rows of all runs."""
        if self._run is None:
            return
        import wandb

        self._run.summary.update(summary_of(record))
        if record.status == "finished":
            rows = table_rows(record)
            self._run.log(
                {key: wandb.Table(columns=list(columns), data=[rows[key]]) for key, columns in TABLES.items()}
            )


def open_run(*, runs: Path, mode: str, **settings: Any) -> Any:
    """wandb.init with every file under `<runs>/wandb`: no prompt, no console capture, no copy of environment or code."""
    import wandb

    folder = runs.resolve() / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    # Table artifacts are staged in WANDB_DATA_DIR until they are synced; its default lies outside the run's folder.
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / ".staging"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder / ".cache"))
    os.environ.setdefault("WANDB_CONFIG_DIR", str(folder / ".config"))
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ValueError("tracking=online needs an account: run `wandb login`, or use tracking=offline and sync later")
    quiet = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_machine_info=True,
        x_disable_stats=True, init_timeout=30,
    )  # fmt: skip
    resume = "allow" if mode == "online" else None
    return wandb.init(
        dir=str(folder.parent), mode=mode, settings=quiet, resume=resume, reinit="finish_previous", **settings
    )


def log_report(
    tracker: Callable[..., "Tracker"], records: Sequence[RunRecord], name: str, figures: Sequence[Path], runs: Path
) -> None:
    """A wandb run of job type `report` with the whole tables and the figures. `tracker` is the partial from conf."""
    import wandb

    settings: dict[str, Any] = tracker.keywords  # type: ignore[attr-defined]
    rows = [table_rows(record) for record in records if record.status == "finished"]
    with open_run(
        runs=runs, mode=settings["mode"], project=settings["project"], entity=settings["entity"],
        name=f"report-{name}", group=name, job_type="report", tags=["report"],
    ) as run:  # fmt: skip
        run.log(
            {key: wandb.Table(columns=list(columns), data=[r[key] for r in rows]) for key, columns in TABLES.items()}
        )
        run.log({path.stem: wandb.Image(str(path)) for path in figures})


def log_study(
    tracker: Callable[..., "Tracker"],
    name: str,
    content: dict[str, Any],
    frames: Mapping[str, pd.DataFrame],
    figures: Sequence[Path],
    runs: Path,
) -> None:
    """A wandb run of job type `study` with one table per data frame and the figures."""
    import wandb

    settings: dict[str, Any] = tracker.keywords  # type: ignore[attr-defined]
    with open_run(
        runs=runs, mode=settings["mode"], project=settings["project"], entity=settings["entity"],
        name=f"study-{name}", group=name, job_type="study", tags=["study"], config=content,
    ) as run:  # fmt: skip
        run.log({key: wandb.Table(dataframe=frame) for key, frame in frames.items()})
        run.log({path.stem: wandb.Image(str(path)) for path in figures})


def summary_of(record: RunRecord) -> dict[str, Any]:
    """Plain scalars, under stable names: what a dashboard groups, averages and plots."""
    summary: dict[str, Any] = {"status": record.status, "run_id": record.run_id}
    if record.status != "finished":
        return summary | {"error": record.error}
    best, final, cost = record.result["test_best"], record.result["test_final"], record.efficiency
    return summary | {
        "test/accuracy": best["accuracy"],
        "test/loss": best["loss"],
        "test/accuracy_final": final["accuracy"],
        "val/best_accuracy": record.result["val_best_accuracy"],
        "throughput/train_examples_per_second": cost["train_step"]["examples_per_second"],
        "throughput/train_steps_per_second": cost["train_step"]["steps_per_second"],
        "throughput/inference_examples_per_second": cost["inference"]["examples_per_second"],
        "memory/train_peak_bytes": cost["train_step"]["peak_memory_bytes"],
        "memory/inference_peak_bytes": cost["inference"]["peak_memory_bytes"],
        "parameters": cost["parameters"],
        "length": cost["length"],
    }


def table_rows(record: RunRecord) -> dict[str, list[Any]]:
    """One row for each of the tables `runs`, `accuracy`, `throughput`, in the order of their columns."""
    best, cost = record.result["test_best"], record.efficiency
    values = {
        **_names(record),
        "run_id": record.run_id,
        "experiment": record.experiment,
        "dataset": record.dataset,
        "status": record.status,
        "test_accuracy": best["accuracy"],
        "correct": best["correct"],
        "total": best["total"],
        "test_loss": best["loss"],
        "val_accuracy": record.result["val_best_accuracy"],
        "steps": record.result["steps"],
        "parameters": cost["parameters"],
        "length": cost["length"],
        "batch_size": cost["batch_size"],
        "train_examples_per_second": cost["train_step"]["examples_per_second"],
        "train_steps_per_second": cost["train_step"]["steps_per_second"],
        "train_peak_memory_bytes": cost["train_step"]["peak_memory_bytes"],
        "inference_examples_per_second": cost["inference"]["examples_per_second"],
        "inference_peak_memory_bytes": cost["inference"]["peak_memory_bytes"],
        "commit": record.provenance["commit"],
        "hardware": hardware_name(record),
    }
    return {key: [values[column] for column in columns] for key, columns in TABLES.items()}


def hardware_name(record: RunRecord) -> str:
    found = record.provenance["hardware"]
    return str(found.get("gpu") or f"{found['cpu']}, {found['threads']} threads")


def _names(record: RunRecord) -> dict[str, Any]:
    return {"task": record.task, "attention": record.label, "protocol": record.protocol, "seed": record.seed}


def _tags(record: RunRecord) -> list[str]:
    kernel = _kernel_of(record.identity["attention"])
    tags = [f"task:{record.task}", f"attention:{record.attention}", f"protocol:{record.protocol}"]
    if kernel is not None:
        tags.append(f"kernel:{kernel}")
    tags.append(f"data:{record.data['source']}")
    if record.data["stand_in"]:
        tags.append("stand-in")
    return [tag[:64] for tag in tags]


def _kernel_of(node: Any) -> str | None:
    """The class name of the first `kernel` in an attention's configuration."""
    if not isinstance(node, dict):
        return None
    if isinstance(node.get("kernel"), dict):
        return str(node["kernel"]["_target_"].rsplit(".", 1)[-1])
    return next((found for value in node.values() if (found := _kernel_of(value))), None)
