"""studies.md holds every claim of every study with its verdict and figure, and refuses damaged records."""

import json

import pytest
from omegaconf import OmegaConf

from lra.studies.report import read_studies, render, report


def study(name="a", **changed):
    verdict = {
        "claim": "x falls", "status": "reproduced", "number": 0.5, "interval": [0.4, None], "conditions": "always",
        "figure": "slope",
    }  # fmt: skip
    return {
        "study": name, "config": {"scale": "quick"}, "seed": 0, "verdicts": [{**verdict, **changed}],
        "provenance": {
            "commit": None, "command": "run.py", "started_at": "now", "hardware": {"cpu": "CPU", "threads": 2},
        },
        "files": ["slope.csv", "slope.png", "slope.pdf", "other.png"],
    }  # fmt: skip


def write(folder, content):
    path = folder / "studies" / content["study"] / "study.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    return path


def test_a_claim_shows_its_verdict_number_interval_and_figure():
    text = render([study()])
    assert "**Reproduced**: 0.5 [0.4, –]" in text and "always" in text
    assert "(a/slope.png)" in text and "(a/other.png)" not in text


def test_a_claim_without_a_figure_of_its_own_shows_all_of_the_study():
    text = render([study(figure=None)])
    assert "(a/slope.png)" in text and "(a/other.png)" in text


def test_the_summary_links_to_a_page_per_claim():
    text = render([study("a"), study("b")])
    for name in ("a-1", "b-1"):
        assert f"(#{name})" in text and f'<a id="{name}">' in text


def test_a_missing_number_is_a_dash_and_a_pipe_does_not_break_the_table():
    text = render([study(number=None, claim="|dq| falls")])
    assert "| – |" in text and r"\|dq\|" in text


def test_the_job_writes_one_report_for_all_studies(tmp_path, capsys):
    write(tmp_path, study("a"))
    write(tmp_path, study("b", status="not reproduced"))
    report(OmegaConf.create({"paths": {"runs": str(tmp_path)}}))
    text = (tmp_path / "studies" / "studies.md").read_text()
    assert text.count("### x falls") == 2 and "Not reproduced" in text
    assert "not reproduced" in capsys.readouterr().out


def test_without_a_study_it_says_what_to_run(tmp_path, capsys):
    report(OmegaConf.create({"paths": {"runs": str(tmp_path)}}))
    assert "run one first" in capsys.readouterr().err
    assert not (tmp_path / "studies").exists()


@pytest.mark.parametrize("damage", ["{", "{}"])
def test_a_damaged_record_is_named_with_the_command_that_mends_it(tmp_path, damage):
    write(tmp_path, study("a")).write_text(damage)
    with pytest.raises(ValueError, match="experiment=a again"):
        read_studies(tmp_path / "studies")
