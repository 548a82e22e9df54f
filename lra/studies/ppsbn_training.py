"""Owns the training half of the ppSBN ablation: variants x seeds under the quick protocol, resumed from a ledger."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, open_dict
from scipy.stats import t

from lra.display import say
from lra.experiment import train
from lra.grid import compose_cell
from lra.identity import identity_of, run_id_of
from lra.ledger import Ledger
from lra.studies.runner import Outputs, Verdict
from lra.tables import Table
from lra.training import Diverged


def train_variants(config: DictConfig, outputs: Outputs) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per run, and one per logged training loss. The ledger is <paths.runs>/studies/<name>/ledger: a variant is
    told from the others by its configuration alone, which the tables of the main ledger do not show."""
    training = config.study.training
    runs, curves = [], []
    cells = [
        (task, variant, seed) for task in training.tasks for variant in training.variants for seed in training.seeds
    ]
    for place, (task, variant, seed) in enumerate(cells):
        say(f"training {place + 1} of {len(cells)}: {task}, {variant}, seed {seed}")
        cell = _cell(config, outputs.folder, task, list(training.variants[variant]), outputs.seed + seed)
        try:
            train(cell)
        except Diverged as diverged:
            say(f"  diverged: {diverged}")
        record = Ledger(cell.paths.runs).find(run_id_of(identity_of(cell)))
        assert record is not None, "a run leaves a record, however it ended"
        key = {"task": task, "variant": variant, "seed": record.seed}
        finished = record.status == "finished"
        runs.append({
            **key, "status": record.status, "run_id": record.run_id, "dataset": record.dataset,
            "accuracy": record.result["test_final"]["accuracy"] if finished else None,
            "loss": record.result["test_final"]["loss"] if finished else None,
            "majority": record.result["majority_accuracy"] if finished else None,
            "steps": record.result.get("steps"),
        })  # fmt: skip
        curves += [{**key, "step": step, "loss": loss} for step, loss in record.result.get("train_curve", [])]
    return pd.DataFrame(runs), pd.DataFrame(curves)


def _cell(config: DictConfig, folder: Path, task: str, overrides: list[str], seed: int) -> DictConfig:
    """One run: the quick protocol at the study's length, tracked by the study's own table alone."""
    settings = dict(config.study.training.tasks[task])
    steps = int(settings["num_steps"])
    settings |= {"warmup_steps": max(2, steps // 5), "eval_every": steps}
    cell = compose_cell([
        f"task={task}", "attention=schoenbat_exp", "protocol=quick", "tracking=disabled", f"seed={seed}",
        f"device={config.device}", f"threads={config.threads}", f"precision={config.precision}", *overrides,
        *(f"per_task.{task}.{key}={value}" for key, value in settings.items()),
        "protocol.log_every=5", "protocol.measure_warmup=1", "protocol.measure_repetitions=1",
    ])  # fmt: skip
    with open_dict(cell):
        cell.experiment = str(config.experiment)
        cell.paths.runs = str(folder)
        cell.paths.datasets = config.paths.datasets
    return cell


def training_table(runs: pd.DataFrame, study: DictConfig) -> Table:
    """Accuracy in percent and test loss over seeds, mean and standard deviation."""
    rows: dict[str, dict[str, str]] = {}
    for (variant, task), group in runs.groupby(["variant", "task"], sort=False):
        done = group[group["status"] == "finished"]
        lost = len(group) - len(done)
        text = (
            f"{100 * done['accuracy'].mean():.1f} ± {100 * done['accuracy'].std(ddof=1):.1f}" if len(done) > 1 else "–"
        )
        loss = f"{done['loss'].mean():.3f} ± {done['loss'].std(ddof=1):.3f}" if len(done) > 1 else "–"
        note = f" ({lost} of {len(group)} did not finish)" if lost else ""
        rows.setdefault(variant, {}).update({f"{task}, accuracy": text + note, f"{task}, test loss": loss})
    steps = ", ".join(f"{task} {settings.num_steps}" for task, settings in study.training.tasks.items())
    majority = ", ".join(f"{task} {100 * group['majority'].max():.1f}" for task, group in runs.groupby("task"))
    return Table(
        "Training under variants of ppSBN",
        pd.DataFrame.from_dict(rows, orient="index").rename_axis("variant"),
        (f"schoenbat_exp, protocol quick cut to fewer steps ({steps}), {len(study.training.seeds)} seeds; final weights.",
         f"Majority class: {majority}."),
    )  # fmt: skip


def training_verdicts(runs: pd.DataFrame, curves: pd.DataFrame, study: DictConfig) -> list[Verdict]:
    """The published form against each ablated one, paired by seed; and the spread of the loss as stability."""
    names = list(study.training.variants)
    full, bare = names[0], names[1]
    diverged = int((runs["status"] != "finished").sum())
    return [
        _difference(runs, full, bare, "accuracy"),
        _stability(runs, curves, full, bare, diverged),
        _difference(runs, "learned temperature", full, "accuracy"),
    ]


def _difference(runs: pd.DataFrame, better: str, worse: str, column: str) -> Verdict:
    """Mean over seeds of the paired difference in percentage points; t interval of so few pairs."""
    grid = runs.pivot_table(index=["task", "seed"], columns="variant", values=column)
    steps = runs["steps"].max()
    if not {better, worse} <= set(grid.columns):
        missing = ", ".join(sorted({better, worse} - set(grid.columns)))
        return Verdict(
            f"{better} trains to a higher accuracy than {worse}; points", "reproduced under conditions", float("nan"), None,
            f"no run of {missing} finished", figure="training",
        )  # fmt: skip
    points = (100 * (grid[better] - grid[worse])).dropna().to_numpy()
    mean, low, high = paired_interval(points)
    status: Any = "reproduced" if low > 0 else "not reproduced"
    return Verdict(
        f"{better} trains to a higher accuracy than {worse}; points of test accuracy",
        status,
        mean,
        (low, high),
        ("" if low > 0 or high < 0 else "undecided, the interval holds 0; ")
        + f"{len(points)} pairs of task and seed, {steps:.0f} steps of the quick protocol, {', '.join(runs['dataset'].unique())}",
        figure="training",
    )


def _stability(runs: pd.DataFrame, curves: pd.DataFrame, full: str, bare: str, diverged: int) -> Verdict:
    """Step-to-step roughness of the training loss, mean absolute second difference, bare over full, paired by seed."""
    rough = curves.sort_values("step").groupby(["task", "variant", "seed"])["loss"].apply(
        lambda loss: float(np.abs(np.diff(loss.to_numpy(), n=2)).mean())
    )  # fmt: skip
    grid = rough.unstack("variant")
    ratios = np.log(grid[bare] / grid[full]).dropna().to_numpy()
    mean, low, high = (float(np.exp(value)) for value in paired_interval(ratios))
    spread = runs.groupby("variant", sort=False)["loss"].std(ddof=1)
    return Verdict(
        f"Training is less stable under {bare} than under {full}; ratio of the loss curves' roughness",
        "reproduced" if low > 1 else "not reproduced",
        mean,
        (low, high),
        ("" if low > 1 or high < 1 else "undecided, the interval holds 1; ")
        + f"{diverged} of {len(runs)} runs diverged; standard deviation of the test loss over seeds "
        f"{spread[bare]:.2g} against {spread[full]:.2g}",
        figure="training",
    )


def paired_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean and its 95 % interval by Student's t; unbounded for a single pair."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("-inf"), float("inf")
    half = float(t.isf(0.025, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half
