"""Tables and figures: exact cells, dashes for what is missing, stand-ins named, the same bytes for the same records."""

import dataclasses

import pytest

from lra.figures import accuracy_against_throughput, save_figure
from lra.records import RunRecord
from lra.tables import MISSING, accuracy_table, efficiency_table, layout_of, tidy


def record(task="listops", attention="softmax", seed=0, correct=50, status="finished", stand_in=False, **changed):
    speed = {"examples_per_second": 100.0 + seed, "steps_per_second": 10.0, "peak_memory_bytes": 3 * 2**20}
    counted = {"accuracy": correct / 200, "correct": correct, "total": 200, "loss": 1.0, "right": ""}
    settings = dict(
        run_id=f"{task}-{attention}-{seed}", status=status, experiment="quick", task=task, attention=attention,
        protocol="quick", seed=seed, overrides=[], identity={"precision": "fp32", "attention": {}},
        data={"stand_in": stand_in, "dataset": f"{task}-x", "source": "generated"},
        result={
            "test_best": counted, "test_final": counted, "val_best_accuracy": 0.5, "steps": 10, "majority_accuracy": 0.17,
        } if status == "finished" else {},
        efficiency={
            "train_step": speed, "inference": speed, "parameters": 7, "attention_parameters": 0, "length": 128,
            "batch_size": 4,
        } if status == "finished" else {},
        provenance={
            "commit": "0123456789abcdef", "hardware": {"cpu": "CPU", "threads": 2}, "seconds": {"fit": 1.0},
        },
    )  # fmt: skip
    return RunRecord(**{**settings, **changed})


def table(records, **layout):
    return accuracy_table(tidy(records), layout_of(records, **layout), "t", 1)


def test_one_seed_shows_no_spread_and_three_show_mean_and_deviation():
    single = table([record()])
    assert single.cells.loc["softmax", "listops"] == "25.0"
    assert any("no spread" in note for note in single.notes)
    several = table([record(seed=seed, correct=correct) for seed, correct in enumerate((40, 50, 60))])
    assert several.cells.loc["softmax", "listops"] == "25.0 ± 5.0"


def test_a_missing_cell_is_a_dash_and_never_counts_as_zero():
    cells = table([record(), record(task="text", correct=100), record(attention="performer")]).cells
    assert cells.loc["performer", "text"] == MISSING
    assert cells.loc["performer", "average"] == MISSING
    assert cells.loc["softmax", "average"] == "37.5"


def test_stated_rows_and_columns_appear_though_no_record_fills_them():
    cells = table([record()], attentions=["softmax", "performer"], tasks=["listops", "image"]).cells
    assert list(cells.columns) == ["listops", "image", "average"]
    assert list(cells.loc["performer"]) == [MISSING, MISSING, MISSING]


@pytest.mark.parametrize(("status", "shown"), [("oom", "OOM"), ("diverged", "diverged"), ("failed", "failed")])
def test_a_run_that_did_not_finish_says_why(status, shown):
    assert table([record(status=status)]).cells.loc["softmax", "listops"] == shown
    both = table([record(), record(seed=1, status=status)]).cells.loc["softmax", "listops"]
    assert both == "25.0 (1 of 2 did not finish)"


def test_stand_ins_are_named_and_explained():
    shown = table([record(task="text", stand_in=True)])
    assert list(shown.cells.columns) == ["text (stand-in: text-x)"]
    assert any("never compare" in note for note in shown.notes)
    assert "stand-in" in shown.markdown() and "stand-in" in shown.latex() and "stand-in" in shown.csv()


def test_the_majority_class_stands_below_the_table():
    assert table([record()]).cells.loc["(majority class)", "listops"] == "17.0"


def test_tasks_stand_in_the_benchmarks_order():
    cells = table([record(task=task) for task in ("pathfinder", "image", "listops", "retrieval", "text")]).cells
    assert list(cells.columns)[:5] == ["listops", "text", "retrieval", "image", "pathfinder"]


def test_efficiency_shows_throughput_and_memory_with_their_shape():
    records = [record(seed=seed) for seed in range(3)]
    shown = efficiency_table(tidy(records), layout_of(records), "t")
    assert shown.cells.loc["softmax", "listops"] == "101 · 3"
    assert "listops: batch 4 x length 128" in shown.notes


def test_latex_escapes_what_latex_would_read():
    text = table([record(attention="linear_transformer")]).latex()
    assert r"linear\_transformer" in text and "% Seeds" in text


def test_variants_with_overrides_get_rows_of_their_own():
    variant = dataclasses.replace(record(), run_id="other", overrides=["attention.dropout=0.1"])
    assert list(table([record(), variant]).cells.index)[:2] == ["softmax", "softmax (attention.dropout=0.1)"]


def test_runs_that_kept_freed_memory_and_others_are_not_mixed_unsaid():
    kept = record(seed=1)
    kept = dataclasses.replace(kept, provenance={**kept.provenance, "keeps_freed_memory": True})

    def notes(*records):
        return " ".join(efficiency_table(tidy(records), layout_of(records), "t").notes)

    assert "1 of 2 runs gave freed memory back" in notes(record(), kept)
    assert "freed memory" not in notes(kept) + notes(record())


def test_the_note_on_seeds_says_where_they_differ():
    def note(*records):
        return next(line for line in table([record(**one) for one in records]).notes if line.startswith("Seeds"))

    assert note({"seed": 0}) == "Seeds: 0. One seed: no spread can be given."
    assert note({"seed": 0}, {"seed": 1}) == "Seeds: 0, 1."
    more = {"task": "text"}
    assert (
        note({"seed": 0}, {"seed": 1}, {"seed": 1, **more})
        == "Seeds: listops: 0, 1; text: 1. One seed shows no spread."
    )
    uneven = note({"seed": 0}, {"seed": 1}, {"seed": 1, "attention": "performer"})
    assert uneven == "Seeds: 0, 1, but not all in every cell; a cell without ± holds one."


def test_a_figure_of_a_grid_that_has_only_begun_has_its_legend():
    figure = accuracy_against_throughput(tidy([record()]), ["listops"], ["softmax", *map(str, range(30))])
    legends = [panel.get_legend() for panel in figure.axes if panel.get_legend()]
    assert [text.get_text() for text in legends[0].get_texts()] == ["softmax", "majority class"]


def test_the_same_records_give_the_same_bytes(tmp_path):
    records = [record(), record(attention="performer", correct=70)]
    outputs = []
    for place in ("a", "b"):
        frame = tidy(records)
        figure = accuracy_against_throughput(frame, ["listops"], ["softmax", "performer"])
        paths = save_figure(figure, tmp_path / place / "figure")
        outputs.append([path.read_bytes() for path in paths] + [table(records).markdown()])
    assert outputs[0] == outputs[1]
