"""The reader of the released Pathfinder files, on a small tree written here in the published layout."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.base import DataError
from data.pathfinder_release import (
    Record,
    find_level,
    metadata_sha256,
    read_image,
    read_records,
    split_records,
)

LEVEL = "pathfinder32/curv_contour_length_14"


def row(batch: int, number: int, label: int | str) -> list[str]:
    values = (f"imgs/{batch}", f"sample_{number}.png", number, label, 1.0, 14, 4, 2, 0.5, 1, 1)
    return [str(value) for value in values]


def write_level(level: Path, batches: dict[int, int], save: str = "text") -> None:
    """`batches`: number of a metadata file -> images in it. The label of image n of batch b is (b + n) % 2."""
    (level / "metadata").mkdir(parents=True)
    for batch, count in batches.items():
        (level / "imgs" / str(batch)).mkdir(parents=True)
        rows = [row(batch, number, (batch + number) % 2) for number in range(count)]
        for number in range(count):
            pixels = np.full((32, 32), 10 * batch + number, np.uint8)
            Image.fromarray(pixels).save(level / "imgs" / str(batch) / f"sample_{number}.png")
        file = level / "metadata" / f"{batch}.npy"
        if save == "text":
            file.write_text("".join(" ".join(values) + "\n" for values in rows))
        elif save == "crlf":
            file.write_bytes("".join(" ".join(values) + "\r\n" for values in rows).encode())
        else:
            np.save(file, np.array(rows).astype(save))


def contents(level: Path) -> list[tuple[str, int, int]]:
    records, _ = read_records(level)
    return [
        (str(record.image.relative_to(level)), record.label, int(read_image(record, 32)[0, 0])) for record in records
    ]


@pytest.fixture
def level(tmp_path) -> Path:
    write_level(tmp_path / LEVEL, {0: 3, 2: 2, 10: 4})
    return tmp_path / LEVEL


def test_records_come_in_order_of_the_file_number_and_the_line(level):
    expected = [
        (f"imgs/{b}/sample_{n}.png", (b + n) % 2, 10 * b + n) for b, c in ((0, 3), (2, 2), (10, 4)) for n in range(c)
    ]
    assert contents(level) == expected


@pytest.mark.parametrize("save", ["crlf", "U", "S"])
def test_text_and_numpy_metadata_give_identical_samples(level, tmp_path, save):
    other = tmp_path / "other" / LEVEL
    write_level(other, {0: 3, 2: 2, 10: 4}, save)
    assert contents(other) == contents(level)


@pytest.mark.parametrize("root", ["lra_release/lra_release", "lra_release", "."])
def test_the_level_is_found_however_the_release_was_unpacked(tmp_path, root):
    write_level(tmp_path / root / LEVEL, {0: 1})
    assert find_level(tmp_path, 32, 14) == tmp_path / root / LEVEL
    assert find_level(tmp_path, 32, 9) is None
    assert find_level(tmp_path, 64, 14) is None


def test_images_of_length_zero_are_skipped_and_counted(level):
    (level / "imgs" / "2" / "sample_1.png").write_bytes(b"")
    records, empty = read_records(level)
    assert empty == 1
    assert len(records) == 8
    assert all(record.image.name != "sample_1.png" or record.image.parent.name != "2" for record in records)


def test_the_split_is_a_seeded_permutation_cut_into_80_10_10():
    records = [Record(Path(str(i)), 0, "") for i in range(109)]
    splits = split_records(records, split_seed=3)
    assert {name: len(members) for name, members in splits.items()} == {"train": 89, "val": 10, "test": 10}
    assert {record.image for members in splits.values() for record in members} == {record.image for record in records}
    assert split_records(records, split_seed=3) == splits
    assert split_records(records, split_seed=4) != splits


def test_colours_are_read_as_grey(level):
    file = level / "imgs" / "0" / "sample_0.png"
    Image.new("RGB", (32, 32), (200, 200, 200)).save(file)
    assert (read_image(Record(file, 0, ""), 32) == 200).all()


def test_the_digest_follows_every_byte_of_the_metadata(level):
    before = metadata_sha256(level)
    file = level / "metadata" / "10.npy"
    file.write_text(file.read_text().replace(" 1 1.0", " 0 1.0", 1))
    assert metadata_sha256(level) != before


def change_line(level: Path, line: int, values: list[str]) -> None:
    file = level / "metadata" / "2.npy"
    lines = file.read_text().splitlines()
    lines[line - 1] = " ".join(values)
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (row(2, 1, 1)[:3], r"2\.npy, line 2: 3 columns, expected 11; unpack"),
        ([], r"2\.npy, line 2: 0 columns, expected 11"),
        (row(2, 1, 2), r"2\.npy, line 2: label \(column 4\) is '2', expected 0 or 1"),
        (row(2, 1, "1.0"), r"2\.npy, line 2: label \(column 4\) is '1\.0'"),
        (["../../secret", *row(2, 1, 1)[1:]], r"2\.npy, line 2: '../../secret/sample_1\.png' points outside"),
        (["/etc", *row(2, 1, 1)[1:]], r"2\.npy, line 2: '/etc/sample_1\.png' points outside"),
        (row(2, 7, 1), r"2\.npy, line 2: .*imgs/2/sample_7\.png is missing; unpack"),
    ],
    ids=["columns", "blank", "label 2", "label 1.0", "climbing", "absolute", "no image"],
)
def test_a_bad_record_is_named_by_file_and_line(level, values, message):
    change_line(level, 2, values)
    with pytest.raises(DataError, match=message):
        read_records(level)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("3.npy", b"", r"3\.npy: the file is empty"),
        ("3.npy", b"\xff\xfe\x00", r"3\.npy: neither text nor a NumPy array"),
        ("3.npy", b"\x93NUMPY\x01\x00\x10", r"3\.npy: not a NumPy array of strings"),
        ("notes.npy", b"", r"notes\.npy: the name of a metadata file is a number"),
    ],
)
def test_a_bad_metadata_file_is_named(level, name, content, message):
    (level / "metadata" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(level)


def test_arrays_that_are_no_table_of_strings_are_refused_and_pickles_never_run(level):
    file = level / "metadata" / "3.npy"
    np.save(file, np.zeros((2, 11)))
    with pytest.raises(DataError, match=r"3\.npy: array of float64 with shape \(2, 11\), expected strings"):
        read_records(level)
    np.save(file, np.array([[Path("x")]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"3\.npy: not a NumPy array of strings"):
        read_records(level)


def test_an_image_of_another_size_or_a_damaged_one_is_named_with_its_record(level):
    records, _ = read_records(level)
    Image.new("L", (64, 48)).save(records[4].image)
    with pytest.raises(DataError, match=r"2\.npy, line 2: .*sample_1\.png has 64x48 pixels, expected 32x32"):
        read_image(records[4], 32)
    records[0].image.write_bytes(records[0].image.read_bytes()[:45])
    with pytest.raises(DataError, match=r"0\.npy, line 1: .*sample_0\.png cannot be decoded"):
        read_image(records[0], 32)
