"""The reader of the released ListOps files: what it accepts, and what it says about everything else."""

import itertools
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data.base import DataError
from data.listops import ListOps
from data.listops_generator import generate
from data.listops_pool import Grammar
from data.listops_reader import read
from data.listops_text import evaluate, to_source, tokenise

ROOT = Path(__file__).parents[2]
EXAMPLE = "( ( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 7 ) ] ) ) 0 ) ] )"
ROWS = [(EXAMPLE, 4), ("( ( ( [MED 1 ) 4 ) ] )", 2), ("7", 7)]
HEADER = "Source\tTarget"

OFFICIAL_FOLDERS = ("lra_release/lra_release/listops-1000", "lra_release/listops-1000", "listops-1000")


def text(rows: list[tuple[str, object]], newline: str = "\r\n") -> bytes:
    return newline.join([HEADER, *(f"{source}\t{target}" for source, target in rows), ""]).encode()


def file_of(folder: Path, content: bytes) -> Path:
    file = folder / "basic_train.tsv"
    file.write_bytes(content)
    return file


def official(datasets: Path, **changes: object) -> ListOps:
    config = {"paths": {"datasets": str(datasets)}, "task": OmegaConf.load(ROOT / "conf/task/listops.yaml")}
    arguments = OmegaConf.to_container(OmegaConf.create(config), resolve=True)["task"]
    del arguments["_target_"]
    return ListOps(**arguments | {"source": "official", "num_train": 3, "num_val": 2, "num_test": 1} | changes)


def release(datasets: Path, folder: str) -> Path:
    (datasets / folder).mkdir(parents=True)
    for split in ("train", "val", "test"):
        (datasets / folder / f"basic_{split}.tsv").write_bytes(text(ROWS))
    return datasets / folder


@pytest.mark.parametrize("newline", ["\r\n", "\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("tail", ["", "whole", "blank lines"])
def test_line_ends_byte_order_marks_and_tails_do_not_matter(tmp_path: Path, newline: str, mark: bytes, tail: str):
    content = mark + text(ROWS, newline)
    content = {"": content.rstrip(), "whole": content, "blank lines": content + 2 * newline.encode()}[tail]
    pool = read(file_of(tmp_path, content), 3)
    assert pool.labels.tolist() == [4, 2, 7]
    assert pool.tokens.tolist() == [token for source, _ in ROWS for token in tokenise(source, "x")]
    assert np.diff(pool.offsets).tolist() == [8, 4, 1]


def test_generated_expressions_survive_the_way_through_a_file(tmp_path: Path):
    pool = generate(Grammar(10, 10, 0.25, 500, 2000), 300, seed=0, num_workers=1)
    sources = [to_source(ids) for ids in np.split(pool.tokens, pool.offsets[1:-1])]
    again = read(file_of(tmp_path, text(list(zip(sources, pool.labels, strict=True)))), 300)
    for part in ("tokens", "offsets", "labels"):
        assert np.array_equal(getattr(again, part), getattr(pool, part))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("7", "1 columns where 2 are expected"),
        ("7\t7\t7", "3 columns where 2 are expected"),
        ("7\t10", "the target '10' is not one of 0..9"),
        ("7\t-1", "the target '-1' is not one of 0..9"),
        ("7\tseven", "the target 'seven' is not one of 0..9"),
        ("7\t", "the target '' is not one of 0..9"),
        ("( ( ( [AVG 1 ) 4 ) ] )\t2", "character 7: '[AVG' is not a ListOps token"),
        ("( ( ( [MED 1 ) 14 ) ] )\t2", "'14' is not a ListOps token"),
        ("( ( ( [MED 1 )  4 ) ] )\t2", "'' is not a ListOps token"),
        ("( ( ( [MED 1 ) 4 ) ]\t2", "unbalanced expression, Source ends where the expression needs ')' after ']'"),
        ("( ( ( [MED 1 ) 4 ) ] ) )\t2", "unbalanced expression, ')' where the expression needs the end"),
        ("( ( [MED 1 ) 4 ) ] )\t2", "unbalanced expression, '4' where the expression needs ']'"),
        ("( ( ( [MED 1 4 ) ] )\t2", "unbalanced expression, '4' where the expression needs ')'"),
        ("[MED 1 4 ]\t2", "unbalanced expression, '[MED' where the expression needs a digit"),
        ("\t2", "unbalanced expression, Source ends"),
        ("( ( ( [MED 1 ) 4 ) ] )\t3", "the target contradicts the expression, whose value is 2"),
        ("", "an empty line"),
        ("( ( [MIN " * 1001 + "\t2", "1000 operators open at once"),
    ],
)
def test_a_malformed_row_is_named_with_file_line_and_reason(tmp_path: Path, row: str, message: str):
    content = f"{HEADER}\r\n7\t7\r\n{row}\r\n7\t7\r\n".encode()
    file = file_of(tmp_path, content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read(file, 3)
    assert f"{file}, line 3, " in str(caught.value)
    assert read(file, 1).labels.tolist() == [7]  # rows beyond those asked for are not read


@pytest.mark.parametrize(
    "header", [b"source\ttarget", b"Source,Target", b"Source\tTarget\tId", b"7\t7", b"", b"\xff\xfeS\x00o\x00"]
)
def test_another_header_is_refused(tmp_path: Path, header: bytes):
    file = file_of(tmp_path, header + b"\r\n7\t7\r\n")
    with pytest.raises(DataError, match=r"line 1: the header is .* where 'Source\\tTarget' is expected"):
        read(file, 1)


def test_an_empty_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"basic_train\.tsv is empty"):
        read(file_of(tmp_path, b""), 1)


@pytest.mark.parametrize("newline", ["\r\n", "\n", "\r"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, newline: str):
    content = text(ROWS, newline).rstrip()
    assert read(file_of(tmp_path, content), 3).labels.tolist() == [4, 2, 7]
    for size in range(len(content)):
        with pytest.raises(DataError, match=r"basic_train\.tsv"):
            read(file_of(tmp_path, content[:size]), 3)


def test_a_last_line_that_is_cut_is_said_to_be_cut(tmp_path: Path):
    with pytest.raises(DataError, match=r"line 3, .* the file ends within this line"):
        read(file_of(tmp_path, text(ROWS)[:-20]), 3)
    with pytest.raises(DataError, match="holds 3 rows where 4 are asked for"):
        read(file_of(tmp_path, text(ROWS)), 4)


# The definition once more, on trees and with the standard library's median: an operator is (name, arguments).
trees = st.recursive(
    st.integers(0, 9),
    lambda inner: st.tuples(st.sampled_from(["MIN", "MAX", "MED", "SM"]), st.lists(inner, min_size=1, max_size=5)),
    max_leaves=20,
)


def value(tree) -> int:
    if isinstance(tree, int):
        return tree
    arguments = [value(argument) for argument in tree[1]]
    functions = {"MIN": min, "MAX": max, "MED": statistics.median, "SM": lambda numbers: sum(numbers) % 10}
    return int(functions[tree[0]](arguments))


def printed(tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    pairs = f"[{tree[0]}"
    for argument in tree[1]:
        pairs = f"( {pairs} {printed(argument)} )"
    return f"( {pairs} ] )"


@settings(max_examples=150, deadline=None)
@given(st.lists(trees, min_size=1, max_size=4))
def test_reader_and_slow_definition_agree_with_the_definition_on_trees(tmp_path_factory, forest):
    sources = [printed(tree) for tree in forest]
    labels = [value(tree) for tree in forest]
    pool = read(file_of(tmp_path_factory.getbasetemp(), text(list(zip(sources, labels, strict=True)))), len(forest))
    assert pool.labels.tolist() == labels
    for source, label, ids in zip(sources, labels, np.split(pool.tokens, pool.offsets[1:-1]), strict=True):
        assert evaluate(source) == label
        assert tokenise(source, "x") == ids.tolist()
        assert to_source(ids) == source


symbols = st.sampled_from(["(", ")", "]", "[MIN", "[MAX", "[MED", "[SM", "X", "3", "12", "[MINX", "[", "", "\0(", "é"])


@settings(max_examples=300, deadline=None)
@given(trees, st.lists(st.tuples(st.integers(0, 200), st.sampled_from("dir"), symbols), max_size=2), st.integers(0, 9))
def test_an_edited_row_is_read_exactly_when_the_slow_definition_accepts_it(tmp_path_factory, tree, edits, target):
    words = printed(tree).split()
    for place, kind, symbol in edits:
        place %= len(words) + 1
        words[place : place + (kind != "i")] = [] if kind == "d" else [symbol]
    source = " ".join(words)
    try:
        ids, expected = tokenise(source, "x"), evaluate(source)
    except DataError:
        ids, expected = None, None
    file = file_of(tmp_path_factory.getbasetemp(), text([(source, target if expected is None else expected)]))
    if expected is None or "" in words[:-1]:
        with pytest.raises(DataError, match="line 2, "):
            read(file, 1)
    else:
        pool = read(file, 1)
        assert (pool.tokens.tolist(), pool.labels.tolist()) == (ids, [expected])


def read_until_refused(file: Path) -> None:
    for num_rows in itertools.count(1):
        assert len(read(file, num_rows).labels) == num_rows


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(st.binary(max_size=8), st.sampled_from([b"7\t7\n", b"7\t", b"\r", b"( ( [MIN 1 ) ] )\t1\n"]))
    ).map(b"".join)
)
def test_arbitrary_bytes_are_read_or_refused_but_never_crash(tmp_path_factory, content):
    file = file_of(tmp_path_factory.getbasetemp(), HEADER.encode() + b"\n" + content)
    with pytest.raises(DataError, match=r"basic_train\.tsv"):
        read_until_refused(file)


@pytest.mark.parametrize("folder", OFFICIAL_FOLDERS)
def test_the_release_is_found_at_each_accepted_place(tmp_path: Path, folder: str):
    release(tmp_path, folder)
    task = official(tmp_path)
    assert task.check() == []
    manifest = task.prepare()
    assert manifest.counts == {"train": 3, "val": 2, "test": 1}
    assert (manifest.source, manifest.stand_in) == ("official", False)
    assert manifest.details["files"]["val"] == f"{folder}/basic_val.tsv"
    assert task.split("val").labels.tolist() == [4, 2]
    assert official(tmp_path, brackets="none").split("test").tokens.tolist() == tokenise(EXAMPLE, "none")


def test_a_changed_file_is_read_again(tmp_path: Path):
    folder = release(tmp_path, OFFICIAL_FOLDERS[0])
    first = official(tmp_path).prepare()
    (folder / "basic_test.tsv").write_bytes(text([("3", 3)]))
    second = official(tmp_path).prepare()
    assert second.sha256["test"] != first.sha256["test"]
    assert second.sha256["train"] == first.sha256["train"]


def test_missing_files_are_listed_with_the_way_to_get_them(tmp_path: Path):
    missing = official(tmp_path).check()
    assert [entry.what for entry in missing] == ["basic_train.tsv", "basic_val.tsv", "basic_test.tsv"]
    assert missing[0].expected_at == tmp_path / OFFICIAL_FOLDERS[0] / "basic_train.tsv"
    assert "lra_release.gz" in missing[0].how_to_get
    (release(tmp_path, OFFICIAL_FOLDERS[2]) / "basic_val.tsv").unlink()
    (entry,) = official(tmp_path).check()
    assert entry.expected_at == tmp_path / OFFICIAL_FOLDERS[2] / "basic_val.tsv"
    with pytest.raises(DataError, match=r"basic_val\.tsv[^$]*task\.source=generated"):
        official(tmp_path).prepare()


def test_a_row_beyond_max_len_is_named_when_truncation_is_off(tmp_path: Path):
    release(tmp_path, OFFICIAL_FOLDERS[0])
    assert official(tmp_path, max_len=3).split("train").lengths().tolist() == [[3], [3], [1]]
    with pytest.raises(DataError, match=r"basic_train\.tsv, line 2: 8 tokens where task\.max_len=3 \(2 of 3"):
        official(tmp_path, max_len=3, truncate=False).prepare()
