"""Owns the tests of the Image task: grey formulas, splits, the Fashion-MNIST stand-ins, and their committed part."""

import gzip
import struct
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from data import embed_image, fashion, sources
from data.base import SPLITS, DataError
from data.fashion import EMBEDDED, EMBEDDED_COUNTS, FashionSplit, place, read_embedded, read_idx
from data.hub import HubReader, Rows
from data.image import Image, pil_grayscale, shrink, tf_grayscale
from data.subsets import index_sha256

VECTORS = [  # R, G, B, TensorFlow, Pillow
    (255, 0, 0, 76, 76), (0, 255, 0, 149, 150), (0, 0, 255, 29, 29), (1, 2, 3, 1, 2), (250, 128, 7, 150, 151),
    (128, 128, 128, 128, 128), (255, 255, 255, 255, 255),
]  # fmt: skip


def make_image(datasets: Path, **changes: Any) -> Image:
    settings: dict[str, Any] = {
        "source": "embedded", "datasets": str(datasets), "vocab_size": 256, "size": 32, "pixel_zero_is_pad": False,
        "hub_reader": "datasets", "hub_path": None, "grayscale": "tf", "augment": "shift_flip", "num_validation": 20,
        "split_seed": 0, "num_train": None, "num_val": None, "num_test": None,
    }  # fmt: skip
    return Image(**{**settings, **changes})


def images_of(task: Image, split: str) -> np.ndarray:
    return np.asarray(task.split(split).tokens).reshape(-1, task.size, task.size)


# grey


@pytest.mark.parametrize("vector", VECTORS)
def test_grey_follows_both_published_formulas(vector: tuple[int, ...]) -> None:
    rgb = np.array(vector[:3], dtype=np.uint8)
    assert (int(tf_grayscale(rgb)), int(pil_grayscale(rgb))) == vector[3:]


def test_grey_is_exact_on_random_colours() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (2000, 3), dtype=np.uint8)
    weights = [Fraction(w, 10000) for w in (2989, 5870, 1140)]
    exact = [floor(Fraction(511, 2) * sum(w * int(c) for w, c in zip(weights, t, strict=True)) / 255) for t in rgb]
    assert tf_grayscale(rgb).tolist() == exact
    pillow = np.asarray(PIL.Image.fromarray(rgb.reshape(40, 50, 3)).convert("L")).reshape(-1)
    np.testing.assert_array_equal(pil_grayscale(rgb), pillow)


def test_grey_stays_grey() -> None:
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    assert tf_grayscale(grey).tolist() == pil_grayscale(grey).tolist() == list(range(256))


def test_shrinking_is_the_rounded_mean_of_blocks() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    for size in (16, 8):
        block = 32 // size
        for n, row, column in ((0, 0, 0), (1, 3, 5), (2, size - 1, size - 2)):
            cells = images[n, row * block : (row + 1) * block, column * block : (column + 1) * block]
            mean = Fraction(int(cells.sum()), block**2)
            assert shrink(images, size)[n, row, column] == floor(mean + Fraction(1, 2))
    np.testing.assert_array_equal(shrink(images, 32), images)


# CIFAR-10


@pytest.fixture
def small_hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    colours = {
        split: generator.integers(0, 256, (n, 32, 32, 3), np.uint8) for split, n in (("train", 100), ("test", 30))
    }

    def read(_: HubReader) -> dict[str, Rows]:
        return {split: (list(images), np.arange(len(images)) % 10) for split, images in colours.items()}

    monkeypatch.setattr(HubReader, "read", read)
    return colours


@pytest.mark.parametrize(("name", "grey"), [("tf", tf_grayscale), ("pil", pil_grayscale)])
def test_cifar10_is_served_whole_row_by_row_with_the_chosen_grey(
    tmp_path: Path, small_hub: dict[str, np.ndarray], name: str, grey: Any
) -> None:
    task = make_image(tmp_path, source="hub", grayscale=name)
    manifest = task.prepare()
    assert (manifest.dataset, manifest.stand_in, task.max_len) == ("image", False, 1024)
    assert manifest.counts == {"train": 80, "val": 20, "test": 30}
    batches = list(task.batches("test", 7))
    tokens = np.concatenate([batch.tokens.numpy() for batch in batches])
    np.testing.assert_array_equal(tokens, grey(small_hub["test"]).reshape(30, 1, 1024))
    assert np.concatenate([batch.labels.numpy() for batch in batches]).tolist() == [n % 10 for n in range(30)]
    assert all(batch.key_padding_mask is None for batch in batches)


def test_the_holdout_is_a_seeded_permutation_and_named_by_its_digest(
    tmp_path: Path, small_hub: dict[str, np.ndarray]
) -> None:
    task = make_image(tmp_path, source="hub")
    grey = tf_grayscale(small_hub["train"])
    row_of = {image.tobytes(): row for row, image in enumerate(grey)}
    rows = {split: [row_of[image.tobytes()] for image in images_of(task, split)] for split in ("train", "val")}
    assert sorted(rows["train"] + rows["val"]) == list(range(100))
    assert task.prepare().details["validation_rows_sha256"] == index_sha256(np.array(rows["val"]))
    again = make_image(tmp_path / "again", source="hub").prepare()
    other = make_image(tmp_path, source="hub", split_seed=1).prepare()
    assert again.sha256 == task.prepare().sha256
    assert other.sha256["val"] != again.sha256["val"]


def test_black_pixels_are_hidden_only_by_the_named_quirk(tmp_path: Path) -> None:
    plain = next(make_image(tmp_path).batches("test", 8))
    quirk = next(make_image(tmp_path, pixel_zero_is_pad=True).batches("test", 8))
    assert plain.key_padding_mask is None
    assert quirk.key_padding_mask is not None
    assert (quirk.key_padding_mask == (quirk.tokens == 0)).all()
    assert quirk.key_padding_mask.any()


def test_cut_or_shrunken_cifar10_is_a_stand_in(tmp_path: Path, small_hub: dict[str, np.ndarray]) -> None:
    cut = make_image(tmp_path, source="hub", num_train=20).prepare()
    assert (cut.dataset, cut.stand_in, cut.counts["train"]) == ("image-subset", True, 20)
    shrunken = make_image(tmp_path, source="hub", size=16)
    assert (shrunken.prepare().dataset, shrunken.prepare().stand_in) == ("image-16", True)
    np.testing.assert_array_equal(images_of(shrunken, "test"), shrink(tf_grayscale(small_hub["test"]), 16))


# the committed part


def test_the_committed_part_is_small_balanced_and_licensed() -> None:
    assert EMBEDDED.stat().st_size <= 3_000_000
    assert sources.sha256_file(EMBEDDED) == fashion.EMBEDDED_SHA256
    assert "Zalando" in EMBEDDED.with_name("LICENSE.fashion-mnist").read_text()
    splits = read_embedded()
    for name, split in splits.items():
        assert split.images.shape == (EMBEDDED_COUNTS[name], 28, 28)
        assert np.bincount(split.labels).tolist() == [EMBEDDED_COUNTS[name] // 10] * 10
        assert (np.diff(split.rows) > 0).all()
    assert not np.isin(splits["val"].rows, splits["train"].rows).any()
    images = np.concatenate([split.images for split in splits.values()]).reshape(6000, -1)
    assert len(np.unique(images, axis=0)) == 6000


def test_its_script_writes_the_same_rows_again(tmp_path: Path) -> None:
    path = tmp_path / "fashion.parquet"
    embed_image.write(embed_image.embedded_part(read_embedded()), path)
    assert pq.ParquetFile(path).read().equals(pq.ParquetFile(EMBEDDED).read())


def test_a_changed_committed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "fashion.parquet"
    damaged.write_bytes(EMBEDDED.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(fashion, "EMBEDDED", damaged)
    with pytest.raises(DataError, match="SHA-256"):
        make_image(tmp_path).prepare()


@pytest.mark.parametrize(("size", "augment", "dataset"), [
    (32, "shift_flip", "image-fashion32-quick"),
    (16, "shift_flip", "image-fashion16-quick"),
    (32, "none", "image-fashion32-plain-quick"),
])  # fmt: skip
def test_the_embedded_source_serves_a_named_stand_in(tmp_path: Path, size: int, augment: str, dataset: str) -> None:
    task = make_image(tmp_path, size=size, augment=augment, num_train=50, num_val=30)
    assert task.check() == []
    manifest = task.prepare()
    assert (manifest.dataset, manifest.stand_in) == (f"{dataset}-subset", True)
    assert manifest.counts == {"train": 50, "val": 30, "test": 1000}
    assert np.bincount(task.split("train").labels).tolist() == [5] * 10
    assert (task.split("test").lengths() == size * size).all()
    assert task.max_len == size * size


def test_each_image_is_shifted_and_perhaps_mirrored_but_otherwise_unchanged() -> None:
    split = read_embedded()["train"]
    placed = place(split, "train", shift_flip=True)
    kinds = []
    for image, field in zip(split.images[:60], placed[:60], strict=True):
        found = [
            (down, right, mirrored)
            for mirrored in (False, True)
            for down in range(5)
            for right in range(5)
            if np.array_equal(
                np.pad(image[:, ::-1] if mirrored else image, ((down, 4 - down), (right, 4 - right))), field
            )
        ]
        assert found
        kinds.append(found[0])
    assert len(set(kinds)) > 20
    np.testing.assert_array_equal(
        place(split, "train", shift_flip=False), np.pad(split.images, ((0, 0), (2, 2), (2, 2)))
    )


def test_offsets_and_mirrors_are_fair_and_belong_to_the_row() -> None:
    count = 4000
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 0, 0] = 255  # a mark in the upper left corner tells all
    placed = place(FashionSplit(images, np.zeros(count), np.arange(count)), "train", shift_flip=True)
    _, down, right = np.nonzero(placed)
    mirrored = right >= 27
    # 4,000 fair draws: six standard deviations are 190 mirrors and 152 of each offset; false alarm below 1e-7 in all
    assert abs(int(mirrored.sum()) - count // 2) < 190
    assert (abs(np.bincount(down, minlength=5) - count // 5) < 152).all()
    rows = np.array([7, 3999])
    few = place(FashionSplit(images[rows], np.zeros(2), rows), "train", shift_flip=True)
    np.testing.assert_array_equal(few, placed[rows])
    other = place(FashionSplit(images, np.zeros(count), np.arange(count)), "test", shift_flip=True)
    assert not np.array_equal(other, placed)


# the Debian package


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def small_fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Real IDX files, 10 classes of 8 + 3 images, two of each class for validation, brought by hand."""
    folder = tmp_path / "downloads" / "fashion-mnist"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 80), ("t10k", 30)):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        labels = generator.permutation(np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    monkeypatch.setattr(fashion, "FILES", {path.name: sources.sha256_file(path) for path in folder.iterdir()})
    monkeypatch.setattr(fashion, "VAL_PER_CLASS", 2)
    monkeypatch.setattr(fashion, "COUNTS", {"train": 60, "val": 20, "test": 30})
    _, held = fashion.split_rows(read_idx(folder / "train-labels-idx1-ubyte.gz"))
    monkeypatch.setattr(fashion, "VAL_ROWS_SHA256", index_sha256(held))
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "not installed")
    return folder


def test_validation_is_the_last_of_each_class(small_fashion: Path) -> None:
    labels = read_idx(small_fashion / "train-labels-idx1-ubyte.gz")
    kept, held = fashion.split_rows(labels)
    for label in range(10):
        assert set(np.flatnonzero(labels == label)[-2:]) == set(held[labels[held] == label])
    assert sorted([*kept, *held]) == list(range(80))


def test_the_files_of_the_package_are_served(tmp_path: Path, small_fashion: Path) -> None:
    task = make_image(tmp_path, source="debian", augment="none")
    assert task.check() == []
    manifest = task.prepare()
    assert (manifest.dataset, manifest.stand_in) == ("image-fashion32-plain", True)
    assert manifest.counts == {"train": 60, "val": 20, "test": 30}
    raw = read_idx(small_fashion / "t10k-images-idx3-ubyte.gz")
    np.testing.assert_array_equal(images_of(task, "test")[:, 2:30, 2:30], raw)


@pytest.mark.parametrize("constant", ["VAL_ROWS_SHA256", "COUNTS"])
def test_other_rows_than_the_pinned_ones_are_refused(
    tmp_path: Path, small_fashion: Path, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    monkeypatch.setattr(fashion, constant, "0" * 64)
    with pytest.raises(DataError, match="expected"):
        make_image(tmp_path, source="debian").prepare()


def test_a_changed_package_file_is_refused(tmp_path: Path, small_fashion: Path) -> None:
    (small_fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(30, np.uint8))))
    with pytest.raises(DataError, match="t10k-labels"):
        make_image(tmp_path, source="debian").prepare()


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"", mtime=0), gzip.compress(idx(np.zeros(9, np.uint8))[:-1], mtime=0),
                                     gzip.compress(struct.pack(">HBBI", 0, 13, 1, 1) + b"0", mtime=0)])  # fmt: skip
def test_a_malformed_idx_file_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"file\.gz"):
        read_idx(tmp_path / "file.gz")


def test_without_apt_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "not installed")
    monkeypatch.setenv("PATH", "")
    task = make_image(tmp_path, source="debian")
    assert [missing.expected_at for missing in task.check()] == [tmp_path / "downloads" / "fashion-mnist"]
    with pytest.raises(DataError, match=r"dataset-fashion-mnist.*apt-get"):
        task.prepare()


# settings and cache


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "cifar"}, "hub, debian, embedded"),
        ({"grayscale": "mean"}, "tf, pil"),
        ({"augment": "crop"}, "shift_flip, none"),
        ({"size": 20}, "32, 16, 8"),
        ({"vocab_size": 255}, "256"),
        ({"num_train": 0}, "train=0"),
        ({"hub_reader": "torch"}, "datasets, tfds"),
    ],
)
def test_a_wrong_setting_is_named_with_its_choices(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make_image(tmp_path, **change)


def test_everything_that_changes_bytes_has_its_own_cache_entry(
    tmp_path: Path, small_hub: dict[str, np.ndarray]
) -> None:
    hub: list[dict[str, Any]] = [
        {}, {"grayscale": "pil"}, {"num_validation": 10}, {"split_seed": 3}, {"size": 8}, {"num_train": 10},
        {"num_val": 10}, {"num_test": 10},
    ]  # fmt: skip
    for change in hub:
        make_image(tmp_path, source="hub", **change).prepare()
    assert len(list((tmp_path / "encoded").iterdir())) == len(hub)
    make_image(tmp_path, source="hub", pixel_zero_is_pad=True).prepare()  # a matter of serving, not of bytes
    assert len(list((tmp_path / "encoded").iterdir())) == len(hub)


def test_the_same_preparation_gives_the_same_bytes_in_every_folder(tmp_path: Path) -> None:
    first = make_image(tmp_path / "a", num_train=100).prepare()
    assert make_image(tmp_path / "b", num_train=100).prepare().sha256 == first.sha256
    assert set(first.sha256) == set(SPLITS)


def test_the_quick_table_sees_the_same_bytes_on_every_machine(tmp_path: Path) -> None:
    assert make_image(tmp_path, size=16).prepare().sha256 == {
        "train": "488f4eaaf4cd295558124e0b5bb021dcf35c7ba92c31b29d11fc5099af710f05",
        "val": "49ed23edca6ef8db13ab9d5d9b43fe030cc4eec9d20894266e3b20e9c50d9221",
        "test": "17325bfca364a2ee4da046e6847252197576806279968b01fb2be81d259f07a8",
    }
