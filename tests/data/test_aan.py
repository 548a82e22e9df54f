"""The released pairs are read byte by byte, and nothing malformed passes."""

import hashlib
import tracemalloc
from pathlib import Path

import pytest

from data.aan import AanFile, Row, expected_folder, find_files
from data.base import DataError

GOOD = b"1.0\tP1\tP2\tfirst text\tsecond text\n"


def rows(folder: Path, content: bytes, max_len: int = 4000) -> list[Row]:
    path = folder / "new_aan_pairs.train.tsv"
    path.write_bytes(content)
    return list(AanFile(path, max_len))


def test_label_and_both_texts_are_read(tmp_path: Path) -> None:
    content = GOOD + b"0.0\tP3\tP4\tthird\tfourth\n"
    assert rows(tmp_path, content) == [Row(1, b"first text", b"second text"), Row(0, b"third", b"fourth")]


def test_quotes_are_ordinary_bytes(tmp_path: Path) -> None:
    content = b'1.0\tP1\tP2\t"an opened quote\tanother " one ""\n' + GOOD
    assert rows(tmp_path, content)[0] == Row(1, b'"an opened quote', b'another " one ""')
    assert len(rows(tmp_path, content)) == 2


def test_windows_line_ends_and_a_byte_order_mark_are_not_text(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") * 2
    assert rows(tmp_path, content) == rows(tmp_path, GOOD * 2)


def test_carriage_returns_inside_a_text_stay(tmp_path: Path) -> None:
    assert rows(tmp_path, b"0.0\ta\tb\tone\rtwo\tthree\n") == [Row(0, b"one\rtwo", b"three")]


def test_texts_are_cut_in_bytes_and_invalid_utf8_is_no_error(tmp_path: Path) -> None:
    text = "né".encode() + b"\xff\xfe"
    assert rows(tmp_path, b"1.0\ta\tb\t" + text + b"\t\xc3\n", max_len=2) == [Row(1, b"n\xc3", b"\xc3")]


def test_an_empty_text_is_a_document_of_no_bytes(tmp_path: Path) -> None:
    assert rows(tmp_path, b"1.0\ta\tb\t\tx\n") == [Row(1, b"", b"x")]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (GOOD + b"1.0\tP1\tP2\tone text\n", 2, "4 columns"),
        (GOOD + b"1.0\tP1\tP2\tone\ttwo\tthree\n", 2, "6 columns"),
        (GOOD + b"\n" + GOOD, 2, "1 columns"),
        (GOOD * 2 + b"2.0\tP1\tP2\tone\ttwo\n", 3, "label is b'2.0'"),
        (b"label\tid1\tid2\ttext1\ttext2\n" + GOOD, 1, "label is b'label'"),
        (b"nan\tP1\tP2\tone\ttwo\n", 1, "label is b'nan'"),
        (b"0.5\tP1\tP2\tone\ttwo\n", 1, "label is b'0.5'"),
        (b"\tP1\tP2\tone\ttwo\n", 1, "label is b''"),
        (GOOD + GOOD[:-8], 2, "cut off"),
        (GOOD + b"1.0\tP1", 2, "cut off"),
    ],
)
def test_a_malformed_row_is_named_with_its_file_and_line(tmp_path: Path, content: bytes, line: int, what: str) -> None:
    with pytest.raises(DataError) as caught:
        rows(tmp_path, content)
    message = str(caught.value)
    assert f"new_aan_pairs.train.tsv, line {line}: " in message
    assert what in message


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"new_aan_pairs\.train\.tsv: the file is empty"):
        rows(tmp_path, b"")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(AanFile(tmp_path, 10))


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.aan.MAX_LINE", 1000)
    with pytest.raises(DataError, match=r"line 2: the line is longer than 1,000 bytes"):
        rows(tmp_path, GOOD + b"1.0\ta\tb\t" + b"x" * 5000 + b"\ty\n")


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes(GOOD * 5)
    file = AanFile(path, 3)
    assert [len(row.first) for row in file] == [3] * 5
    assert (file.rows, file.sha256) == (5, hashlib.sha256(GOOD * 5).hexdigest())


@pytest.mark.parametrize("folder", ["lra_release/lra_release/tsv_data", "lra_release/tsv_data", "tsv_data"])
def test_files_are_found_nested_or_not_and_only_together(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    for name in ("train", "eval"):
        (tmp_path / folder / f"new_aan_pairs.{name}.tsv").write_bytes(GOOD)
    assert find_files(tmp_path) is None
    assert expected_folder(tmp_path) == tmp_path / folder
    (tmp_path / folder / "new_aan_pairs.test.tsv").write_bytes(GOOD)
    found = find_files(tmp_path)
    assert found is not None
    assert found["val"] == tmp_path / folder / "new_aan_pairs.eval.tsv"


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    peaks = []
    for number in (50, 400):
        path.write_bytes((b"1.0\ta\tb\t" + b"x" * 10_000 + b"\t" + b"y" * 10_000 + b"\n") * number)
        tracemalloc.start()
        assert sum(1 for _ in AanFile(path, 4000)) == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 50_000
