"""Comparing on the command line: two runs, a task's ranking, wrong ids; and a record's command is that very run."""

import re
import shlex

import pytest
from omegaconf import OmegaConf

from lra.cli import _listed
from lra.compare import compare, differences, find, overview, verdict
from lra.html_report_entries import command_of, gather
from lra.leaderboard import leaderboard, rankings
from lra.ledger import Ledger
from lra.records import RunRecord
from tests.lra.synthetic import make_ledger, make_record
from tests.lra.test_cli import TINY


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


def test_from_the_command_line_to_the_report_and_back(run_cli, tmp_path, capsys):
    """Two tiny runs, compared, ranked, reported; the command in the report means the very run that it stands beside."""
    made = run_cli("-m", *TINY, "attention=softmax,mean_pool", "tracking=disabled")
    assert made.returncode == 0, made.stderr
    paths = sorted((tmp_path / "runs" / "ledger").glob("*.json"))
    records = [RunRecord.from_json(path.read_text()) for path in paths]

    compared = run_cli("job=compare", f"runs={records[0].run_id},{records[1].run_id[:6]}")
    assert compared.returncode == 0, compared.stderr
    assert "attention._target_" in compared.stdout and "McNemar" in compared.stdout
    leaderboard(configured(tmp_path / "runs"))
    assert "| softmax" in capsys.readouterr().out

    output = tmp_path / "report.html"
    reported = run_cli("job=html_report", f"job.output={output}", "job.measured=null")
    assert reported.returncode == 0 and output.exists(), reported.stderr
    published = run_cli("job=report", "report.published=skyformer", "tracking=disabled")
    assert "NOT COMPARABLE" in published.stdout and "38.37 [" in published.stdout

    typed = shlex.split(command_of(records[0]))
    assert typed[:2] == ["python", "run.py"] and typed[-1] == "rerun=true"
    again = run_cli(*typed[2:-1], "tracking=disabled")
    assert again.returncode == 0 and "finished before" in again.stderr, again.stderr
    assert re.search(rf"run {records[0].run_id}", again.stderr)
    assert len(list((tmp_path / "runs" / "ledger").glob("*.json"))) == 2
