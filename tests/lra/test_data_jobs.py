"""The data jobs as they are typed: the table of sources, preparation by name, linear floors, the data report."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method

from data.encoded import encode
from lra.baselines import markdown
from lra.data_cards import comments_of
from lra.floors import FLOORS, Examples, Splits, best_threshold
from lra.identity import identity_of, run_id_of

CONF = Path(__file__).resolve().parents[2] / "conf"

TINY = (
    "task=listops", "task.source=generated", "protocol=quick", "task.num_train=60", "task.num_val=20",
    "task.num_test=20", "task.max_length=40", "task.max_len=40",
)  # fmt: skip


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Run a job in this process, as `python run.py <overrides>` would."""
    monkeypatch.setenv("LRA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LRA_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*overrides: str) -> None:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            get_method(config.job._target_)(config)

    return run


def sources(tmp_path) -> dict[tuple[str, str], dict]:
    rows = json.loads((tmp_path / "runs/data/sources.json").read_text())
    return {(row["task"], row["source"]): row for row in rows}


def test_the_table_names_every_source_what_is_missing_and_how_to_get_it(run_cli, tmp_path):
    done = run_cli("job=data", environment={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    rows = sources(tmp_path)
    for task, names in {"listops": ("generated", "official"), "text": ("hub", "wheel", "embedded"),
                        "retrieval": ("official", "debian", "embedded"), "image": ("hub", "debian", "embedded"),
                        "pathfinder": ("generated", "official"), "pathx": ("generated", "official")}.items():  # fmt: skip
        for source in names:
            assert rows[task, source]["where"].startswith(("/usr/share/datasets", str(tmp_path / "datasets")))
            assert rows[task, source]["how_to_get"]
    assert rows["listops", "official"]["state"] == "missing"
    assert rows["listops", "generated"]["state"] == "on first use"
    assert "lra_release.gz" in done.stdout and "basic_train.tsv" in done.stdout
    assert not (tmp_path / "datasets" / "encoded").exists()  # it prepares nothing


def test_prepare_makes_one_source_ready_and_the_table_then_says_so(job, tmp_path, capsys):
    job("job=data", "job.prepare=true", *TINY)
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["counts"] == {"train": 60, "val": 20, "test": 20}
    job("job=data", *TINY)
    row = sources(tmp_path)["listops", "generated"]
    assert row["state"] == "ready" and row["counts"] == manifest["counts"] and row["sha256"] == manifest["sha256"]
    assert row["bytes"] == sum(path.stat().st_size for path in (tmp_path / "datasets/encoded").glob("*/*"))
    table = capsys.readouterr().out
    assert all(digest[:8] in table for digest in manifest["sha256"].values())
    assert manifest["sha256"]["train"] not in table  # shortened here,
    assert manifest["sha256"]["train"] in (tmp_path / "runs/data/sources.csv").read_text()  # whole there


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("job=data", "job.prepare=true"), "needs task=<name>"),
        (("job=data", "job.prepare=true", "task=listops", "task.source=official"), "basic_train.tsv"),
        (("job=baselines", *TINY, "job.only=[astrology]"), "'astrology' is no floor of this task"),
        (("job=baselines",), "no data set is ready"),
        (("job=data_report",), "no data set is ready"),
    ],
)
def test_what_cannot_be_done_is_explained(job, overrides, message):
    with pytest.raises(ValueError, match=message):
        job(*overrides)


def test_an_unknown_source_ends_with_its_choices_and_exit_code_1(run_cli):
    done = run_cli("job=data", "task=text", "task.source=tape")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "task.source='tape' is unknown for text; choose one of hub, wheel, embedded" in done.stderr


def test_floors_are_kept_and_those_measured_again_replaced(job, tmp_path):
    job("job=baselines", *TINY, "job.only=[majority]")
    job("job=baselines", *TINY, "job.only=[first 16 tokens LR,majority]")
    job("job=baselines", *TINY, "job.only=[log-length LR]", "job.max_examples=50")
    folder = tmp_path / "runs" / "baselines"
    assert pd.read_csv(folder / "listops-generated-40.csv")["floor"].tolist() == ["majority", "first 16 tokens LR"]
    (cut,) = pd.read_csv(folder / "listops-generated-40-first50.csv").to_dict("records")
    assert (cut["train"], cut["floor"]) == (50, "log-length LR")


def test_the_report_shows_samples_settings_floors_and_loading_and_no_place_of_this_machine(job, tmp_path):
    job("job=baselines", *TINY, "job.only=[first 16 tokens LR]")
    job("job=data_report", *TINY, "job.loading_batch_size=4", "job.loading_repetitions=2")
    folder = tmp_path / "runs" / "data_report"
    card, page = (folder / "listops-generated.md").read_text(), (folder / "index.html").read_text()
    for text in (card, page):
        assert "tree depth" in text and "[M" in text and "first 16 tokens LR" in text and "operator_probability" in text
        assert str(tmp_path) not in text
    assert "Assembling a batch of 4" in card
    assert (folder / "listops-generated.png").read_bytes().startswith(b"\x89PNG")


def test_contents_that_are_not_ours_stay_out_of_the_report(job, tmp_path):
    job("job=data", "job.prepare=true", *TINY)
    job("job=data_report", *TINY, "job.may_be_shown=[text-manpages]", "job.loading_batch_size=null")
    text = "".join(path.read_text() for path in (tmp_path / "runs/data_report").glob("*.[mh]*"))
    assert "not ours to pass on" in text
    assert "tree depth" not in text and "[MAX" not in text


def test_bucketing_makes_another_run_and_residency_does_not():
    def run_id(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            return run_id_of(identity_of(config))

    assert run_id("resident=true") == run_id()
    assert run_id("protocol.length_bucketing=true") != run_id()


def test_reviews_of_imdb_are_never_among_what_may_be_shown():
    shown = yaml.safe_load((CONF / "job" / "data_report.yaml").read_text())["job"]["may_be_shown"]
    for name in ("text", "text-imdb20k", "text-imdb20k-quick", "image", "retrieval"):  # IMDb, CIFAR-10, AAN
        assert not name.startswith(tuple(shown))


def pair_splits(linked: bool) -> Splits:
    """Documents of ten words out of 400; linked ones share five."""
    draw = np.random.Generator(np.random.PCG64(0))
    words = [f"w{number:03d}" for number in range(400)]
    parts = []
    for size in (300, 80, 80):
        texts, labels = [], np.arange(size) % 2
        for label in labels:
            one, other = draw.permutation(400)[:10], draw.permutation(400)[:10]
            if label and linked:
                other[:5] = one[:5]
            texts += [" ".join(words[place] for place in side) for side in (one, other)]
        ids = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        parts.append(Examples(encode(ids, labels, 2), np.arange(size), lambda row: row.tobytes().decode()))
    return Splits(*parts)


@pytest.mark.parametrize("floor", ["char 3-gram TF-IDF cosine", "word TF-IDF cosine"])
def test_a_pair_floor_finds_shared_words_and_nothing_where_there_is_nothing(floor):
    """80 test pairs, p = 1/2: 56 right or more has a probability of 2e-4 (binomial); the seed is fixed."""
    assert min(FLOORS["retrieval"][floor](pair_splits(linked=True))) > 0.95
    assert FLOORS["retrieval"][floor](pair_splits(linked=False))[1] < 0.7


def test_the_floor_without_interaction_cannot_see_a_link():
    assert FLOORS["retrieval"]["bag-of-bytes [h1; h2] LR"](pair_splits(linked=True))[1] < 0.7


def test_every_floor_runs_on_a_few_examples():
    for task, floors in FLOORS.items():
        pairs = pair_splits(linked=True)
        singles = [
            Examples(
                encode([part.ids(row)[:40] for row in range(len(part.rows))], part.labels), part.rows, part.text_of
            )
            for part in pairs.parts
        ]
        splits = pairs if task == "retrieval" else Splits(*singles)
        for name, floor in floors.items():
            assert all(0 <= score <= 1 for score in floor(splits)), name


def test_the_threshold_is_the_one_that_does_best():
    assert 0.3 < best_threshold(np.array([0.1, 0.9, 0.3, 0.4]), np.array([0, 1, 0, 1])) < 0.4
    assert best_threshold(np.array([0.1, 0.2]), np.array([1, 1])) == -np.inf
    assert best_threshold(np.array([0.1, 0.2]), np.array([0, 0])) == np.inf


def test_settings_carry_the_comments_of_their_file():
    text = "# head\nsource: ${a:b}  # one | two\nsnakes:   # names\n  length: null      # null: 3\nplain: 3\n"
    expected = {"source": "one | two", "snakes": "names", "snakes.length": "null: 3", "plain": ""}
    assert comments_of(text) == expected


def test_floors_of_a_stand_in_say_so():
    row = dict.fromkeys(("val_accuracy", "test_accuracy", "seconds"), 0.5)
    row |= {"task": "t", "dataset": "d", "source": "wheel", "stand_in": True, "max_len": 9, "train": 1, "val": 1}
    text = markdown(pd.DataFrame([row | {"test": 1, "floor": "f", "test_sha256": "0"}]))
    assert "## d (stand-in)" in text and "| f | 0.500 | 0.500 | 0.5 |" in text
