"""Comparing on the command line: two runs, a task's ranking, wrong ids; and a record's command is that very run."""

import shlex

import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from lra.cli import _listed
from lra.compare import compare, differences, find, overview, verdict
from lra.grid import compose_cell
from lra.html_report_entries import command_of, gather
from lra.identity import identity_of, run_id_of
from lra.leaderboard import leaderboard, rankings
from lra.ledger import Ledger
from lra.report import render
from tests.conftest import ROOT
from tests.lra.synthetic import make_ledger, make_record


def configured(folder, **more):
    return OmegaConf.create({"paths": {"runs": str(folder)}, "names": {"task": "listops"}, **more})


def test_a_beginning_names_a_run_when_only_one_has_it():
    known = {run_id: make_record() for run_id in ("abc1", "abd2", "f00d")}
    assert find("abc", known, "here") == "abc1" and find("f", known, "here") == "f00d"
    assert find("abd2", {**known, "abd2x": make_record()}, "here") == "abd2"


@pytest.mark.parametrize(
    ("name", "message"), [("ab", "2 runs begin with 'ab'; choose one:"), ("abx1", "close ones:"), ("", "close ones:")]
)
def test_a_wrong_id_is_answered_with_close_ones_and_what_they_are(name, message):
    known = {run_id: make_record() for run_id in ("abc1", "abd2", "f00d")}
    with pytest.raises(ValueError, match=message) as caught:
        find(name, known, "here")
    assert "abc1  listops, softmax, seed 0, quick, finished" in str(caught.value)


def test_an_empty_ledger_says_so():
    with pytest.raises(ValueError, match="holds no record yet"):
        find("abc", {}, "here")


def test_a_plain_comma_between_runs_means_a_list_of_names_even_where_they_look_like_numbers():
    for typed in ("runs=951e88,0012", "runs=[951e88,0012]", "runs=951e88, 0012"):
        assert _listed(typed) == "runs=['951e88','0012']"
    assert _listed("runs=") == "runs=[]"
    assert _listed("seed=0,1") == "seed=0,1" and _listed("paths.runs=x") == "paths.runs=x"


@pytest.mark.parametrize(("runs", "message"), [([], "two runs or more"), (["a"], "two runs or more")])
def test_fewer_than_two_runs_are_refused(tmp_path, runs, message):
    with pytest.raises(ValueError, match=message):
        compare(configured(tmp_path, runs=runs))


def test_accuracy_cost_and_configuration_stand_side_by_side(tmp_path, capsys):
    a, b = make_record(attention="softmax", accuracy=0.3), make_record(attention="performer", accuracy=0.6, speed=400.0)
    for record in (a, b):
        Ledger(tmp_path).write(record)
    compare(configured(tmp_path, runs=[a.run_id, b.run_id[:8]]))
    text = capsys.readouterr().out
    assert f"{100 * a.result['test_best']['accuracy']:.2f}" in text and "400.0" in text
    assert "attention._target_" in text and "protocol.name" not in text
    assert "McNemar, exact" in text and "One seed: this compares two trained models" in text


def test_alike_configurations_say_nothing_differs():
    assert differences([make_record(), make_record()]).notes == ("Nothing.",)


def test_different_hardware_is_pointed_out():
    assert "different hardware" in overview([make_record(), make_record(gpu="H200")]).notes[0]


def test_all_common_seeds_enter_the_test(tmp_path):
    records = make_ledger(tmp_path, ["softmax", "performer"], tasks=["listops"])
    by_name = {(record.attention, record.seed): record for record in records}
    lines = "\n".join(verdict(by_name["performer", 0], by_name["softmax", 0], records))
    assert "Seeds 0, 1, 2, which both have finished" in lines and "bootstrap over seeds and examples" in lines
    across = "\n".join(verdict(by_name["performer", 0], by_name["softmax", 1], records))
    assert "Seeds 0 and 1 differ" in across


def test_runs_that_cannot_be_paired_say_why():
    other_data = "\n".join(verdict(make_record(), make_record(source="official"), []))
    assert "the test examples differ" in other_data
    assert "No test: " in "\n".join(verdict(make_record(), make_record(seed=1, status="oom"), []))


def test_the_leaderboard_ranks_with_intervals_and_names_what_was_lost(tmp_path):
    make_ledger(tmp_path, ["softmax", "performer", "skyformer"], tasks=["listops"])
    Ledger(tmp_path).write(make_record(attention="informer", status="oom"))
    (table,) = rankings(gather([tmp_path]).entries)
    assert list(table.cells["attention"]) == ["skyformer", "performer", "softmax"]
    assert all(" to " in cell for cell in table.cells["95 % interval"])
    assert table.cells["p (Holm)"].iloc[0] == "–" and float(table.cells["p (Holm)"].iloc[2]) < 0.05
    assert any("informer: seed 0 oom" in note for note in table.notes)


def test_one_seed_has_no_interval_on_the_leaderboard(tmp_path):
    Ledger(tmp_path).write(make_record())
    (table,) = rankings(gather([tmp_path]).entries)
    assert table.cells["95 % interval"].iloc[0] == "–" and "±" not in table.cells["accuracy, %"].iloc[0]


def test_official_and_generated_data_are_ranked_apart(tmp_path):
    for record in (make_record(), make_record(attention="performer", source="official")):
        Ledger(tmp_path).write(record)
    assert [table.title.split(",")[0] for table in rankings(gather([tmp_path]).entries)] == [
        "listops (generated)",
        "listops (official)",
    ]


def test_a_task_without_runs_says_what_there_is(tmp_path):
    Ledger(tmp_path).write(make_record("text"))
    with pytest.raises(ValueError, match="holds finished runs of text"):
        leaderboard(configured(tmp_path))


def test_the_jobs_run_from_the_command_line(run_cli, tmp_path):
    records = make_ledger(tmp_path / "runs", ["softmax", "performer"], tasks=["listops"])
    compared = run_cli("job=compare", f"runs={records[0].run_id},{records[3].run_id[:8]}")
    assert compared.returncode == 0, compared.stderr
    assert "attention._target_" in compared.stdout and "McNemar" in compared.stdout
    output = tmp_path / "report.html"
    reported = run_cli("job=html_report", f"job.output={output}", "job.measured=null")
    assert reported.returncode == 0 and output.exists(), reported.stderr


def test_tables_show_a_papers_figures_when_asked(tmp_path, capsys):
    make_ledger(tmp_path, ["softmax", "performer"], tasks=["listops"])
    report = {"decimals": 1, "published": "skyformer"}
    render(configured(tmp_path, report=report, experiment=None, tracking={"mode": "disabled"}), None)
    text = capsys.readouterr().out
    assert "NOT COMPARABLE" in text and "38.37 [" in text
    with pytest.raises(ValueError, match="choose one of"):
        render(configured(tmp_path, report={**report, "published": "nobody"}, experiment=None), None)


@pytest.mark.parametrize("experiment", [None, "quick", "accuracy"])
def test_a_records_command_means_that_very_run(experiment):
    choices = ["task=listops", "attention=schoenbat_exp", "seed=3"]
    overrides = ["protocol.num_steps=30", "attention.feature_map.num_features=64", "task.brackets=none"]
    protocol = {"quick": "quick", "accuracy": "skyformer", None: "schoenbat"}[experiment]
    how = [f"experiment={experiment}"] if experiment else [f"protocol={protocol}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        identity = identity_of(compose_cell([*how, *choices, *overrides]))
        record = make_record(
            "listops", "schoenbat_exp", 3, protocol=protocol, experiment=experiment, overrides=overrides
        )
        typed = shlex.split(command_of(record))
        assert typed[:2] == ["python", "run.py"]
        assert run_id_of(identity_of(compose_cell(typed[2:]))) == run_id_of(identity)
