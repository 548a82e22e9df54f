"""Published figures: a checked file, names of ours, and footnotes that say what is not the same measurement."""

from pathlib import Path

import pandas as pd
import pytest

from lra.published import FOLDER, differences, load_figures, load_paper, paper_keys, with_published
from lra.tables import MISSING, accuracy_table, efficiency_table, layout_of, tidy
from tests.conftest import ROOT
from tests.lra.synthetic import TASKS, make_record


def shown(records, key, kind="accuracy"):
    frame, layout = tidy(records), layout_of(records)
    table = accuracy_table(frame, layout, "t", 1) if kind == "accuracy" else efficiency_table(frame, layout, "t")
    return with_published(table, load_paper(key), kind, records)


def notes_of(table, cell):
    letters = cell[cell.index("[") + 1 : -1].split(",")
    return [note for note in table.notes if note.startswith(tuple(f"[{letter}]" for letter in letters))]


def test_the_file_holds_914_figures_of_six_sources():
    frame = load_figures()
    assert len(frame) == 914
    assert frame["paper"].nunique() == 6
    assert frame[frame["paper"].str.startswith("Skyformer") & (frame["metric"] == "accuracy")]["value"].notna().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "acuracy"}, "line 2: unknown metric 'acuracy'"),
        ({"unit": "GB"}, "line 2: accuracy in 'GB'"),
        ({"value": 101.0}, "line 2: 101.0 is no percentage"),
        ({"source": None}, "line 2: paper, table, method, task and source may not be empty"),
    ],
)
def test_a_row_that_breaks_the_schema_is_named(tmp_path, change, message):
    frame = pd.read_csv(FOLDER / "published_lra.csv")
    for key, value in change.items():
        frame.loc[0, key] = value
    path = tmp_path / "broken.csv"
    frame.to_csv(path, index=False)
    with pytest.raises(ValueError, match=message):
        load_figures(path)


def test_a_figure_that_stands_twice_or_a_lost_column_is_refused(tmp_path):
    frame = pd.read_csv(FOLDER / "published_lra.csv")
    twice, lost = tmp_path / "twice.csv", tmp_path / "lost.csv"
    pd.concat([frame, frame.iloc[[7]]]).to_csv(twice, index=False)
    frame.drop(columns="source").to_csv(lost, index=False)
    with pytest.raises(ValueError, match="line 916: this figure stands in the file twice"):
        load_figures(twice)
    with pytest.raises(ValueError, match="expected"):
        load_figures(lost)


@pytest.mark.parametrize("key", paper_keys())
def test_every_method_name_is_in_the_file_and_every_attention_in_conf(key):
    paper = load_paper(key)
    assert len(paper.figures) and paper.attentions
    assert set(paper.attentions) <= set(paper.figures["method"])
    for attention in paper.attentions.values():
        assert (ROOT / "conf" / "attention" / f"{attention}.yaml").exists(), attention
    assert paper.protocol is None or (ROOT / "conf" / "protocol" / f"{paper.protocol}.yaml").exists()


def test_an_unknown_paper_is_answered_with_the_choices():
    with pytest.raises(ValueError, match="choose one of lra, skyformer, spectraformer"):
        load_paper("skyforme")


def test_the_published_row_stands_below_ours_with_its_figure():
    table = shown([make_record(), make_record(attention="mean_pool")], "skyformer")
    assert [*table.cells.index] == ["softmax", "softmax (Skyformer: Self-Attention)", "mean_pool", "(majority class)"]
    assert table.cells.loc["softmax (Skyformer: Self-Attention)", "listops"].startswith("38.37 [")
    assert "38.49 ± " in shown([make_record()], "spectraformer").cells.iloc[1, 0]


@pytest.mark.parametrize(
    "ours",
    [
        make_record("text", stand_in=True, protocol="skyformer", source="embedded"),
        make_record("text", source="hub", protocol="quick"),
        make_record("text", source="hub", protocol="skyformer", overrides=["per_task.text.num_steps=100"]),
    ],
    ids=["stand-in", "quick", "fewer steps"],
)
@pytest.mark.parametrize("key", paper_keys())
def test_what_cannot_be_compared_says_so(ours, key):
    table = shown([ours], key)
    for name in table.cells.index:
        if "(" in name and "majority" not in name:
            cell = table.cells.loc[name].iloc[0]
            assert any("NOT COMPARABLE" in note for note in notes_of(table, cell)), cell


def test_the_papers_protocol_on_official_data_compares_and_names_the_remaining_differences():
    table = shown([make_record(source="official", protocol="skyformer")], "skyformer")
    notes = notes_of(table, table.cells.iloc[1, 0])
    assert not any("NOT COMPARABLE" in note for note in notes)
    assert any("ListOps without brackets" in note for note in notes)
    assert any("moving window" in note for note in notes)
    assert not any("validation is the test set" in note for note in notes), "that is a quirk of Text"


def test_a_quirk_that_ours_imitates_is_no_difference():
    plain = make_record(source="official", protocol="skyformer")
    quirky = make_record(
        source="official",
        protocol="skyformer",
        overrides=["task.brackets=none"],
        identity={"task": {"brackets": "none"}},
    )
    paper = load_paper("skyformer")
    assert any("brackets" in text for text in differences(paper, "accuracy", "listops", [plain]))
    assert not any("brackets" in text for text in differences(paper, "accuracy", "listops", [quirky]))
    assert any("brackets" in text for text in differences(paper, "accuracy", "listops", [plain, quirky]))


def test_a_variant_of_ours_is_not_set_beside_the_papers_plain_method_nor_held_against_it():
    records = [make_record(source="official", protocol="skyformer", overrides=text) for text in ([], ["model.dim=128"])]
    table = shown(records, "skyformer")
    names = ["softmax", "softmax (Skyformer: Self-Attention)", "softmax (model.dim=128)", "(majority class)"]
    assert [*table.cells.index] == names
    assert not any("NOT COMPARABLE" in note for note in table.notes)


def test_generated_data_is_not_passed_off_as_the_released_files():
    texts = differences(load_paper("skyformer"), "accuracy", "listops", [make_record(protocol="skyformer")])
    assert any("self-generated" in text for text in texts)


def test_cost_names_checkpointing_for_softmax_only():
    table = shown([make_record(source="official", protocol="skyformer")], "skyformer", "cost")
    cell = table.cells.loc["softmax (Skyformer: Self-Attention)", "listops"]
    assert cell.startswith("2.24 h · 5.37 GB [")
    assert any("activation checkpointing for softmax only" in note for note in notes_of(table, cell))


def test_the_papers_average_stands_only_beside_all_five_tasks():
    five = [make_record(task, source="official", protocol="skyformer") for task in TASKS]
    assert shown(five, "skyformer").cells.loc["softmax (Skyformer: Self-Attention)", "average"].startswith("57.37 [")
    assert shown(five[:4], "skyformer").cells.loc["softmax (Skyformer: Self-Attention)", "average"] == MISSING


def test_markdown_latex_and_csv_all_carry_the_footnotes():
    table = shown([make_record()], "skyformer")
    assert "NOT COMPARABLE" in table.markdown() and "NOT COMPARABLE" in table.latex()
    assert r"softmax (Skyformer: Self-Attention)" in table.csv()


def test_the_file_names_no_place_outside_the_publications():
    assert "file id" not in Path(FOLDER / "published_lra.csv").read_text()
