"""The report's content and its one file: pure, complete, honest about what is missing, readable by a browser alone."""

import base64
import gzip
import json
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from lra.html_report import measured_folders, render
from lra.html_report_data import Report, flat, thin
from lra.html_report_entries import command_of, gather
from lra.ledger import Ledger
from lra.published import load_paper
from lra.statistics import summarise
from tests.lra.synthetic import make_ledger, make_record


def written(runs: Path, *records):
    for record in records:
        Ledger(runs).write(record)
    return gather([runs])


def content_of(gathered, papers=()):
    return Report(gathered, [load_paper(key) for key in papers]).content()


def cell_of(content, attention, column, sheet="|"):
    (row,) = [row for row in content["sheets"][sheet]["rows"] if row["row"][0] == attention]
    return row["cells"][column]


def unpacked(page: str, name: str) -> str:
    (packed,) = re.findall(rf'id="packed-{name}">([^<]+)<', page)
    return gzip.decompress(base64.b64decode(packed)).decode()


def test_the_same_records_give_the_same_bytes(tmp_path):
    make_ledger(tmp_path / "runs", ["softmax", "performer"])
    assert render(gather([tmp_path / "runs"])) == render(gather([tmp_path / "runs"]))


def test_one_file_below_six_megabytes_that_names_no_address(tmp_path):
    make_ledger(tmp_path / "runs", ["softmax", "performer"])
    page = render(gather([tmp_path / "runs"]))
    assert len(page) < 6e6
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "default-src 'none'" in page
    assert "Plotly" in unpacked(page, "plotly")
    assert len(json.loads(unpacked(page, "content"))["runs"]) == 30


def test_a_cell_holds_mean_deviation_interval_and_its_runs(tmp_path):
    records = [make_record(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((0.3, 0.4, 0.5))]
    content = content_of(written(tmp_path, *records))
    cell = cell_of(content, "softmax", "listops (generated)")
    expected = summarise([100 * record.result["test_best"]["accuracy"] for record in records])
    assert (cell["n"], cell["seeds"]) == (3, [0, 1, 2])
    assert cell["mean"] == pytest.approx(expected.mean, rel=1e-5) and cell["low"] == pytest.approx(
        expected.low, rel=1e-5
    )
    assert {content["runs"][place]["id"] for place in cell["runs"]} == {record.run_id for record in records}


def test_one_seed_has_no_spread_in_any_field(tmp_path):
    cell = cell_of(content_of(written(tmp_path, make_record())), "softmax", "listops (generated)")
    assert cell["n"] == 1 and not {"std", "low", "high"} & set(cell)


def test_a_seed_that_was_run_on_two_machines_counts_once(tmp_path):
    Ledger(tmp_path / "a").write(make_record())
    Ledger(tmp_path / "b").write(make_record(gpu="H200"))
    content = content_of(gather([tmp_path / "a", tmp_path / "b"]))
    assert cell_of(content, "softmax", "listops (generated)")["n"] == 1
    assert len(cell_of(content, "softmax", "listops (generated)")["runs"]) == 2
    assert cell_of(content, "softmax", "listops (generated)", "|H200")["n"] == 1


def test_runs_with_other_settings_or_data_never_share_a_mean(tmp_path):
    records = [
        make_record(), make_record(protocol="skyformer"), make_record(source="official", seed=1),
        make_record(overrides=["protocol.num_steps=7"], identity={"protocol": {"num_steps": 7}}, seed=2),
        make_record(overrides=["attention.dropout=0.1"], identity={"attention": {"dropout": 0.1}}, seed=3),
        make_record(identity={"model": {"dim": 32}}, seed=4),  # a YAML file was changed: no override tells of it
    ]  # fmt: skip
    rows = content_of(written(tmp_path, *records))["sheets"]["|"]["rows"]
    assert [cell["n"] for row in rows for cell in row["cells"].values()] == [1] * 6


def test_a_run_that_did_not_finish_is_counted_and_named(tmp_path):
    content = content_of(written(tmp_path, make_record(), make_record(seed=1, status="diverged")))
    cell = cell_of(content, "softmax", "listops (generated)")
    assert (cell["n"], cell["lost"], cell["lostCount"]) == (1, ["diverged"], 1)


def test_a_damaged_and_an_older_record_are_shown_with_their_paths_and_left_out(tmp_path):
    record = make_record()
    path = Ledger(tmp_path).write(record)
    (path.parent / "broken.json").write_text("{")
    older = {**json.loads(path.read_text()), "schema_version": 0}
    (path.parent / "older.json").write_text(json.dumps(older))
    gathered = gather([tmp_path])
    page = render(gathered)
    assert len(gathered.entries) == 1 and "2 files left out" in page
    assert f"{path.parent}/broken.json: not valid JSON" in page
    assert f"{path.parent}/older.json: schema version 0; this suite reads version" in page


def test_a_record_cannot_smuggle_mark_up_into_the_page(tmp_path):
    page = render(written(tmp_path, make_record(experiment="</script><script>alert(1)</script>")))
    assert "alert(1)" not in page


def test_published_rows_carry_the_reasons_why_they_do_not_compare(tmp_path):
    (paper,) = content_of(written(tmp_path, make_record()), ["skyformer"])["papers"]
    ((method, cells),) = [rows["softmax"] for rows in paper["rows"].values()]
    figure, letters = cells["listops (generated)"]
    assert (method, figure) == ("Self-Attention", "38.37")
    assert any(paper["footnotes"][letter].startswith("NOT COMPARABLE") for letter in letters.split(","))


def test_comparisons_are_against_softmax_and_corrected_together(tmp_path):
    make_ledger(tmp_path, ["softmax", "performer", "skyformer"], tasks=["listops", "image"])
    rows = content_of(gather([tmp_path]))["comparisons"]
    assert {(row["attention"], row["reference"]) for row in rows} == {
        ("performer", "softmax"),
        ("skyformer", "softmax"),
    }
    assert len(rows) == 4 and all(row["holm"] >= row["p"] for row in rows)


def test_each_distinct_configuration_is_stored_once(tmp_path):
    content = content_of(written(tmp_path, *(make_record(seed=seed) for seed in range(5))))
    assert len(content["parts"]["protocol"]) == 1 and len(content["parts"]["seed"]) == 5
    assert content["parts"]["protocol"][0] == {"protocol.name": "quick", "protocol.num_steps": 50}


def test_the_command_names_every_choice_and_override():
    record = make_record(seed=3, overrides=["attention.dropout=0.1", "+per_task.listops.x='a b'"])
    assert command_of(record) == (
        "python run.py experiment=quick task=listops attention=softmax protocol=quick seed=3 attention.dropout=0.1 "
        """'+per_task.listops.x='"'"'a b'"'"'' rerun=true"""
    )


def test_curves_are_thinned_to_their_ends():
    curve = [[step, 1 / (step + 1)] for step in range(1000)]
    short = thin(curve, 50)
    assert len(short) == 50 and short[0][0] == 0 and short[-1][0] == 999
    assert thin(curve[:7], 50) == [[step, float(f"{1 / (step + 1):.4g}")] for step in range(7)]


def test_nested_settings_become_dotted_keys():
    assert flat({"a": {"b": 1, "c": [1, 2]}}, "x") == {"x.a.b": 1, "x.a.c": [1, 2]}


def test_figures_of_studies_are_embedded_up_to_a_limit_and_named_beyond(tmp_path, monkeypatch):
    Ledger(tmp_path).write(make_record())
    folder = tmp_path / "studies" / "kernel_error"
    folder.mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(folder / "a_small.png")
    Image.effect_noise((100, 100), 90).save(folder / "b_large.png")
    (folder / "c_cut.png").write_bytes(b"\x89PNG")
    monkeypatch.setattr("lra.html_report.FIGURE_BYTES", 500)
    content = json.loads(unpacked(render(gather([tmp_path])), "content"))
    assert [(one["study"], one["name"]) for one in content["figures"]] == [("kernel_error", "a small")]
    large, cut = content["figuresLeftOut"]
    assert large == f"{folder / 'b_large.png'} (0.0 MB)" and cut.startswith(f"{folder / 'c_cut.png'} (cannot be read:")


def test_the_benchmarks_training_steps_stand_beside_the_runs_lengths(tmp_path):
    Ledger(tmp_path).write(make_record())
    step = {"part": "scaling", "subject": "softmax", "length": 1000, "batch_size": 4, "status": "measured"}
    rows = [
        {**step, "wall_median": 0.5, "peak_memory_bytes": 8 * 2**20},
        {**step, "length": 64000, "status": "oom"},
        {"part": "layer", "subject": "softmax", "length": 10},
    ]
    occasion = {"hardware": {"cpu": "CPU", "threads": 2}}
    record = {"occasion": occasion, "threads": {"torch": 2}, "precision": "fp32", "rows": rows}
    folder = tmp_path / "benchmark"
    folder.mkdir()
    (folder / "good.json").write_text(json.dumps(record))
    (folder / "odd.json").write_text("[]")
    gathered = gather([tmp_path])
    (row,) = [row for row in content_of(gathered)["lengths"] if row["task"] == "benchmark"]
    assert (row["length"], row["train"], row["memory"], row["hardware"]) == (1000, 8000.0, 2.0, "CPU, 2 threads")
    assert len(gathered.damaged) == 1 and "odd.json: no benchmark record" in gathered.damaged[0]


def test_committed_results_are_found_at_any_depth(tmp_path):
    for place in ("gpu/quick/ledger", "cpu/ledger", "cpu/studies"):
        (tmp_path / place).mkdir(parents=True)
    assert measured_folders(str(tmp_path)) == [tmp_path / "cpu", tmp_path / "gpu" / "quick"]
    assert measured_folders(None) == []


def test_five_hundred_runs_render_in_seconds(tmp_path):
    """Ten thousand took 10 s of one core; as much for a twentieth of them would be another algorithm."""
    make_ledger(tmp_path, [f"attention_{i}" for i in range(10)], seeds=range(10))
    started = time.process_time()
    page = render(gather([tmp_path]))
    assert time.process_time() - started < 10
    assert len(page) < 6e6
