"""The wandb workspace: its panels, their names against what is logged, and what is said without an account."""

import json

import pytest
from omegaconf import OmegaConf

from lra import dashboard
from lra.ledger import Ledger
from lra.tracking import TABLES
from tests.lra.synthetic import make_record

pytest.importorskip("wandb_workspaces", reason="no wandb-workspaces: pip install wandb-workspaces")
# the package's own: it still declares its checks in pydantic's older way
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")


def configured(runs, mode="offline"):
    tracking = {
        "_target_": "lra.tracking.Tracker", "_partial_": True, "mode": mode, "project": "long-range-arena", "entity": None,
    }  # fmt: skip
    return OmegaConf.create({"paths": {"runs": str(runs)}, "tracking": tracking})


def panels():
    sections = dashboard.definition(dashboard.build("someone", "long-range-arena"))["spec"]["section"][
        "panelBankConfig"
    ]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def test_the_workspace_has_the_four_parts():
    assert list(panels()) == [
        "Accuracy table",
        "Accuracy against throughput",
        "Curves by attention",
        "Cost against length",
    ]


def test_every_table_that_is_logged_has_a_panel():
    text = json.dumps(panels()["Accuracy table"])
    assert all(f'"{name}"' in text for name in TABLES)


def test_the_scatter_sets_accuracy_against_throughput_by_their_logged_names():
    (scatter,) = panels()["Accuracy against throughput"]
    assert scatter["config"]["xAxis"] == "summary:throughput/train_examples_per_second"
    assert scatter["config"]["yAxis"] == "summary:test/accuracy"


def test_curves_are_grouped_by_attention_over_the_training_step():
    for panel in panels()["Curves by attention"]:
        assert panel["config"]["groupBy"] == "names.value.attention" and panel["config"]["xAxis"] == "trainer/step"
    logged = {name for panel in panels()["Curves by attention"] for name in panel["config"]["metrics"]}
    assert logged == {"val/accuracy", "val/loss", "train/loss"}


def test_a_metric_that_is_not_logged_is_refused(monkeypatch):
    dashboard.check([make_record()])
    monkeypatch.setattr(dashboard, "USED", {"test/acuracy"})
    with pytest.raises(ValueError, match="test/acuracy, which"):
        dashboard.check([make_record()])


def test_offline_it_prints_the_definition_and_says_what_a_sync_will_show(tmp_path, capsys):
    tracked, untracked = make_record(), make_record(seed=1)
    for record in (tracked, untracked):
        Ledger(tmp_path).write(record)
    (tmp_path / "wandb" / f"offline-run-20260101_000000-{tracked.run_id}").mkdir(parents=True)
    dashboard.dashboard(configured(tmp_path))
    printed = capsys.readouterr()
    assert json.loads(printed.out)["displayName"] == dashboard.NAME
    assert "1 offline runs" in printed.err and "a row for each of the 1 runs" in printed.err
    assert "not shown: 1 finished runs" in printed.err and "wandb sync --include-offline" in printed.err


def test_saving_without_an_account_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("wandb.login", lambda **_: False)
    with pytest.raises(ValueError, match="run `wandb login`"):
        dashboard.dashboard(configured(tmp_path, "online"))
