"""Owns the tests of reading IMDb and CIFAR-10 from files in the libraries' own formats, all of them tiny and local."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data import hub
from data.base import DataError
from data.hub import CIFAR10, IMDB, HubReader

SMALL_IMDB = replace(IMDB, counts={"train": 6, "test": 4})
SMALL_CIFAR10 = replace(CIFAR10, counts={"train": 5, "test": 3})
REVIEWS = {
    "train": [("bad <br /> film", 0), ("très mauvais", 0), ("no", 0), ("good", 1), ("great ☃", 1), ("yes", 1)],
    "test": [("dull", 0), ("slow", 0), ("fun", 1), ("bright", 1)],
    "unsupervised": [("whatever", -1)],
}


def pictures(split: str) -> list[tuple[np.ndarray, int]]:
    generator = np.random.default_rng(len(split))
    return [(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8), n) for n in range(SMALL_CIFAR10.counts[split])]


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def imdb_dict() -> datasets.DatasetDict:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"text": [r[0] for r in rows], "label": [r[1] for r in rows]}, features)
            for split, rows in REVIEWS.items()
        }
    )


def cifar10_dict() -> datasets.DatasetDict:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"img": [{"bytes": png(image), "path": None} for image, _ in rows], "label": [r[1] for r in rows]},
                features,
            )
            for split, rows in ((split, pictures(split)) for split in SMALL_CIFAR10.counts)
        }
    )


def assert_reviews(rows: dict[str, hub.Rows]) -> None:
    assert set(rows) == {"train", "test"}
    for split, (texts, labels) in rows.items():
        assert texts == [text.encode() for text, _ in REVIEWS[split]]
        assert labels.tolist() == [label for _, label in REVIEWS[split]]


def assert_pictures(rows: dict[str, hub.Rows]) -> None:
    for split, (images, labels) in rows.items():
        np.testing.assert_array_equal(np.stack(images), np.stack([image for image, _ in pictures(split)]))
        assert labels.tolist() == [label for _, label in pictures(split)]


LAYOUTS = {
    "hub": "plain_text/{split}-00000-of-00001.parquet",
    "flat": "{split}.parquet",
    "converted": "plain_text/{split}/0000.parquet",
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_folder_of_parquet_files_is_read_in_order(tmp_path: Path, layout: str) -> None:
    for split, part in imdb_dict().items():
        path = tmp_path / LAYOUTS[layout].format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.to_parquet(str(path))
    assert_reviews(HubReader(SMALL_IMDB, "datasets", tmp_path, tmp_path).read())


def test_parquet_shards_are_joined_in_order_of_their_numbers(tmp_path: Path) -> None:
    for split in SMALL_IMDB.counts:
        part = imdb_dict()[split]
        half = len(part) // 2
        part.select(range(half, len(part))).to_parquet(str(tmp_path / f"{split}-00001-of-00002.parquet"))
        part.select(range(half)).to_parquet(str(tmp_path / f"{split}-00000-of-00002.parquet"))
    assert_reviews(HubReader(SMALL_IMDB, "datasets", tmp_path, tmp_path).read())


def test_image_parquet_is_decoded_to_the_pixels_that_were_stored(tmp_path: Path) -> None:
    for split, part in cifar10_dict().items():
        part.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    assert_pictures(HubReader(SMALL_CIFAR10, "datasets", tmp_path, tmp_path).read())


def test_a_save_to_disk_folder_is_read_texts_and_images(tmp_path: Path) -> None:
    imdb_dict().save_to_disk(tmp_path / "imdb")
    cifar10_dict().save_to_disk(tmp_path / "cifar10")
    assert_reviews(HubReader(SMALL_IMDB, "datasets", tmp_path / "imdb", tmp_path).read())
    assert_pictures(HubReader(SMALL_CIFAR10, "datasets", tmp_path / "cifar10", tmp_path).read())


def test_the_default_place_is_found_without_being_named(tmp_path: Path) -> None:
    reader = HubReader(SMALL_IMDB, "datasets", None, tmp_path)
    assert [missing.expected_at for missing in reader.check()] == [tmp_path / "downloads" / "imdb"]
    imdb_dict().save_to_disk(tmp_path / "downloads" / "imdb")
    assert reader.check() == []
    assert_reviews(reader.read())


def test_the_hub_by_name_gives_the_same_rows_as_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(hub, "load_hub_dataset", lambda *names: asked.append(names) or cifar10_dict())
    assert_pictures(HubReader(SMALL_CIFAR10, "datasets", None, tmp_path).read())
    assert asked == [("uoft-cs/cifar10", "plain_text")]


def test_an_unreachable_hub_says_what_to_bring_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: str) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub, "load_hub_dataset", unreachable)
    with pytest.raises(DataError, match=r"train-\*\.parquet.*stanfordnlp/imdb.*downloads/imdb"):
        HubReader(IMDB, "datasets", None, tmp_path).read()


def test_a_shortened_copy_is_refused(tmp_path: Path) -> None:
    imdb_dict().save_to_disk(tmp_path)
    with pytest.raises(DataError, match="train has 6 examples, expected 25000"):
        HubReader(IMDB, "datasets", tmp_path, tmp_path).read()


def test_unlabelled_rows_are_refused(tmp_path: Path) -> None:
    for split, count in SMALL_IMDB.counts.items():
        pq.write_table(pa.table({"text": ["x"] * count, "label": [-1] * count}), tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=r"labels -1..-1"):
        HubReader(SMALL_IMDB, "datasets", tmp_path, tmp_path).read()


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "other columns", "images of another size"])
def test_a_damaged_folder_is_a_data_error_with_advice(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "given"
    if damage != "absent":
        folder.mkdir()
    for split, count in SMALL_CIFAR10.counts.items() if damage not in ("absent", "empty") else ():
        side = 28 if damage == "images of another size" else 32
        images = [{"bytes": png(np.zeros((side, side, 3), np.uint8)), "path": None}] * count
        name = "image" if damage == "other columns" else "img"
        pq.write_table(pa.table({name: images, "label": [0] * count}), folder / f"{split}.parquet")
        if damage == "cut":
            (folder / f"{split}.parquet").write_bytes((folder / f"{split}.parquet").read_bytes()[:-50])
    with pytest.raises(DataError, match=r"given.*task\.hub_path"):
        HubReader(SMALL_CIFAR10, "datasets", folder, tmp_path).read()


def test_other_files_are_another_identity_and_so_another_cache_entry(tmp_path: Path) -> None:
    reader = HubReader(SMALL_IMDB, "datasets", tmp_path, tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"one")
    first = reader.identity()
    (tmp_path / "train.parquet").write_bytes(b"other")
    assert reader.identity() != first


def prepare_tfds(name: str, folder: Path) -> None:
    """A genuine ArrayRecord folder: the library's own builder, its downloading part replaced."""
    builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")

    def reviews(split: str) -> Iterator[tuple[str, dict]]:
        for number, (text, label) in enumerate(REVIEWS[split]):
            yield f"{split}_{number}", {"text": text, "label": ("neg", "pos")[label]}

    def images(split: str) -> Iterator[tuple[str, dict]]:
        for number, (image, label) in enumerate(pictures(split)):
            key = f"{split}_{number:05}"
            yield key, {"id": key, "image": io.BytesIO(png(image)), "label": label}

    rows = reviews if name == "imdb_reviews" else images
    builder._split_generators = lambda dl_manager, **_: {"train": rows("train"), "test": rows("test")}
    builder.download_and_prepare()


def test_prepared_array_records_are_read_without_tensorflow(tmp_path: Path) -> None:
    prepare_tfds("imdb_reviews", tmp_path)
    prepare_tfds("cifar10", tmp_path)
    reader = HubReader(SMALL_IMDB, "tfds", tmp_path, tmp_path)
    assert reader.check() == []
    for split, (texts, labels) in reader.read().items():  # the library stores rows in its own, fixed order
        assert sorted(zip(texts, labels.tolist(), strict=True)) == sorted((t.encode(), n) for t, n in REVIEWS[split])
    for split, (images, labels) in HubReader(SMALL_CIFAR10, "tfds", tmp_path, tmp_path).read().items():
        expected = {label: image for image, label in pictures(split)}
        assert sorted(labels.tolist()) == sorted(expected)
        for image, label in zip(images, labels.tolist(), strict=True):
            np.testing.assert_array_equal(image, expected[label])


def test_unprepared_tfds_is_named_at_once_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    reader = HubReader(IMDB, "tfds", None, tmp_path)
    assert [missing.expected_at for missing in reader.check()] == [tmp_path / "imdb_reviews"]
    with pytest.raises(DataError, match="array_record"):
        reader.read()


def test_an_unknown_reader_names_the_choices(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="datasets, tfds"):
        HubReader(IMDB, "torchvision", None, tmp_path)
