"""Owns the wandb workspace: its panels, their check against the names that lra.tracking logs, and saving it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from lra.display import say
from lra.ledger import Ledger
from lra.records import RunRecord
from lra.tracking import TABLES, summary_of

NAME = "Long Range Arena"
CURVES = ("val/accuracy", "val/loss", "train/loss")
SPEED, INFERENCE = "throughput/train_examples_per_second", "throughput/inference_examples_per_second"
ACCURACY, MEMORY = "test/accuracy", "memory/train_peak_bytes"
LENGTH = "task.max_len"  # of the configuration
USED = {ACCURACY, SPEED, INFERENCE, MEMORY}


def dashboard(config: DictConfig) -> None:
    """The job. `tracking=offline`: check the definition, print it, say what `wandb sync` will show. `online`: save it."""
    settings: dict[str, Any] = instantiate(config.tracking).keywords
    runs = Path(config.paths.runs)
    records, damaged = Ledger(runs).read_all()
    for line in damaged:
        say(f"left out, cannot be read: {line}")
    online = settings["mode"] == "online"
    entity = settings["entity"] or (_account() if online else "entity")
    workspace = build(entity, settings["project"])
    check(records)
    if online:
        workspace.save()
        say(f"saved: {workspace.url}")
        return
    print(json.dumps(definition(workspace), indent=1, sort_keys=True))
    for line in preview(records, runs, settings["project"]):
        say(line)


def build(entity: str, project: str) -> Any:
    """The workspace as wandb's own classes; they check types and ranges while it is built."""
    ws, wr = _interfaces()
    attention = wr.Config("names.attention")
    curves = [
        wr.LinePlot(
            title=name, x="trainer/step", y=[name], groupby=attention, groupby_aggfunc="mean", max_runs_to_show=100
        )
        for name in CURVES
    ]
    tables = [wr.WeavePanelSummaryTable(table_name=name) for name in TABLES]
    speed = wr.ScatterPlot(
        title="Accuracy against throughput", x=wr.SummaryMetric(SPEED), y=wr.SummaryMetric(ACCURACY), log_x=True,
        legend_template="${config:names.attention}, ${config:names.task}, seed ${config:names.seed}",
    )  # fmt: skip
    bars = wr.BarPlot(
        title="Test accuracy by attention", metrics=[ACCURACY], groupby="names.attention", groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
    )  # fmt: skip
    lengths = [
        wr.ScatterPlot(title=title, x=wr.Config(LENGTH), y=wr.SummaryMetric(name), log_x=True, log_y=True)
        for title, name in (
            ("Training throughput against length", SPEED),
            ("Inference throughput against length", INFERENCE),
            ("Peak memory of a training step against length", MEMORY),
        )
    ]
    sections = [
        ws.Section(name="Accuracy table", panels=[*tables, bars], is_open=True),
        ws.Section(name="Accuracy against throughput", panels=[speed], is_open=True),
        ws.Section(name="Curves by attention", panels=curves, is_open=True),
        ws.Section(name="Cost against length", panels=lengths, is_open=True),
    ]
    groups = [ws.Config("names.task"), ws.Config("names.attention")]
    columns = ["run:displayName", f"summary:{ACCURACY}", f"summary:{SPEED}", "config:names.seed"]
    return ws.Workspace(
        entity=entity, project=project, name=NAME, sections=sections,
        settings=ws.WorkspaceSettings(x_axis="trainer/step", max_runs=100),
        runset_settings=ws.RunsetSettings(groupby=groups, pinned_columns=columns),
    )  # fmt: skip


def definition(workspace: Any) -> dict[str, Any]:
    """What would be sent, as plain data."""
    return json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))


def check(records: Sequence[RunRecord]) -> None:
    """Every metric that a panel shows is one that lra.tracking logs. ValueError names those that are not."""
    for record in records:
        if record.status == "finished":
            unknown = sorted(USED - set(summary_of(record)))
            if unknown:
                raise ValueError(f"the dashboard shows {', '.join(unknown)}, which lra/tracking.py does not log")
            return


def preview(records: Sequence[RunRecord], runs: Path, project: str) -> list[str]:
    """What the workspace will show once the offline runs are on the server."""
    folders = sorted((runs / "wandb").glob("offline-run-*"))
    tracked = {folder.name.rsplit("-", 1)[-1] for folder in folders}
    shown = [record for record in records if record.status == "finished" and record.run_id in tracked]
    attentions = sorted({record.label for record in shown})
    lengths = sorted({record.efficiency["length"] for record in shown})
    lines = [
        f"The definition is valid. {len(folders)} offline runs are in {runs / 'wandb'}, {len(shown)} of them finished; "
        f"after `wandb sync` the workspace {NAME!r} of the project {project!r} shows:",
        f"  tables {', '.join(TABLES)}: a row for each of the {len(shown)} runs",
        f"  accuracy against throughput: {len(shown)} points, {len(attentions)} attentions",
        f"  curves by attention ({', '.join(CURVES)}): {', '.join(attentions) or 'none yet'}",
        f"  cost against length: {', '.join(map(str, lengths)) or 'none yet'}",
        "To put them there:  wandb login",
        f"                    wandb sync --include-offline {runs / 'wandb'}/offline-run-*",
        "                    python run.py job=dashboard tracking=online",
    ]
    untracked = sum(record.status == "finished" for record in records) - len(shown)
    if untracked:
        lines.insert(5, f"  not shown: {untracked} finished runs of the ledger that were run with tracking=disabled")
    return lines


def _account() -> str:
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "saving the dashboard needs an account: run `wandb login`, or use tracking=offline to check it"
        )
    entity = wandb.Api().default_entity
    if not entity:
        raise ValueError("wandb names no default entity for this account; give it: tracking.entity=<name>")
    return str(entity)


def _interfaces() -> tuple[Any, Any]:
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2
    except ImportError as error:
        raise ValueError(
            f"the dashboard needs the package wandb-workspaces ({error}); install it: .venv/bin/pip install wandb-workspaces"
        ) from error
    return workspaces, v2
