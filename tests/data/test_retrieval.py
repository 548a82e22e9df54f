"""Retrieval serves the bytes of its pairs, exactly, from each source, and never half an entry."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data.base import DataError
from data.byte_text import byte_ids
from data.encoded import EncodedSplit, encode, load_cache, split_sha256
from data.encoded_writer import CacheWriter, SplitWriter
from data.entries import load_sound
from data.manpage_pairs import embedded_pairs
from data.retrieval import Retrieval

TEXTS = [b"alpha", b"", b"\xff\xfe" + b"z" * 30, 'qu"oted é'.encode(), b"x"]


def task(datasets: Path, **changes: Any) -> Retrieval:
    keys: dict[str, Any] = {
        "source": "official",
        "datasets": str(datasets),
        "vocab_size": 512,
        "max_len": 16,
        "official_rows": None,
        "num_train": None,
        "num_val": None,
        "num_test": None,
        "subset_seed": 0,
    }
    return Retrieval(**(keys | changes))


def pairs_of(number: int) -> list[tuple[int, bytes, bytes]]:
    return [(i * i % 3 % 2, TEXTS[i % 5] + b"%d" % i, TEXTS[(i + 2) % 5]) for i in range(number)]


def write_release(folder: Path, sizes: tuple[int, int, int] = (40, 12, 7)) -> None:
    folder.mkdir(parents=True)
    for name, size in zip(("train", "eval", "test"), sizes, strict=True):
        lines = [b"%d.0\tP%d\tQ%d\t%s\t%s\n" % (row[0], i, i, *row[1:]) for i, row in enumerate(pairs_of(size))]
        (folder / f"new_aan_pairs.{name}.tsv").write_bytes(b"".join(lines))


@pytest.fixture
def release(tmp_path: Path) -> Path:
    write_release(tmp_path / "lra_release/lra_release/tsv_data")
    return tmp_path


def expected_split(number: int, max_len: int) -> EncodedSplit:
    sequences = [[byte + 1 for byte in text[:max_len]] for _, *texts in pairs_of(number) for text in texts]
    labels = [label for label, *_ in pairs_of(number)]
    return encode([np.array(ids, dtype=np.int64) for ids in sequences], labels, num_sequences=2)


def test_official_pairs_are_served_byte_by_byte(release: Path) -> None:
    retrieval = task(release)
    manifest = retrieval.prepare()
    assert (manifest.dataset, manifest.stand_in) == ("retrieval", False)
    assert manifest.counts == {"train": 40, "val": 12, "test": 7}
    for split, size in manifest.counts.items():
        expected = expected_split(size, 16)
        served = retrieval.split(split)  # type: ignore[arg-type]
        assert manifest.sha256[split] == expected.sha256() == served.sha256()


def test_batches_hold_both_documents_with_masks_from_true_lengths(release: Path) -> None:
    batches = list(task(release).batches("test", batch_size=4))
    assert [len(batch.labels) for batch in batches] == [4, 3]
    rows = [
        (tokens, mask) for batch in batches for tokens, mask in zip(batch.tokens, batch.key_padding_mask, strict=True)
    ]
    for (tokens, mask), (_, *texts) in zip(rows, pairs_of(7), strict=True):
        for s, text in enumerate(texts):
            ids = tokens[s][~mask[s]].tolist()
            assert ids == [byte + 1 for byte in text[:16]]
            assert not tokens[s][mask[s]].any()
    assert torch.cat([batch.labels for batch in batches]).tolist() == [label for label, *_ in pairs_of(7)]


def test_byte_ids_leave_zero_to_padding_and_truncate() -> None:
    assert byte_ids("Abcé".encode(), 9).tolist() == [66, 99, 100, 196, 170]
    assert byte_ids(b"\x00\xff", 9).tolist() == [1, 256]
    assert byte_ids(b"abc", 2).tolist() == [98, 99]


def test_the_released_row_counts_are_enforced(release: Path) -> None:
    rows = {"train": 40, "val": 12, "test": 7}
    assert task(release, official_rows=rows).prepare().counts == rows
    with pytest.raises(DataError, match=r"new_aan_pairs\.eval\.tsv: 12 rows, the released file has 18,090"):
        task(release, official_rows=rows | {"val": 18090}).prepare()
    with pytest.raises(DataError, match="official_rows has keys"):
        task(release, official_rows={"train": 40})


def test_a_malformed_release_leaves_nothing_behind(release: Path) -> None:
    with open(release / "lra_release/lra_release/tsv_data/new_aan_pairs.test.tsv", "ab") as file:
        file.write(b"1.0\tonly\tthree\n")
    with pytest.raises(DataError, match=r"new_aan_pairs\.test\.tsv, line 8: 3 columns"):
        task(release).prepare()
    assert list((release / "encoded").iterdir()) == []


def test_missing_files_are_listed_with_their_place(tmp_path: Path) -> None:
    missing = task(tmp_path).check()
    assert [entry.what for entry in missing] == [f"new_aan_pairs.{name}.tsv" for name in ("train", "eval", "test")]
    assert missing[0].expected_at == tmp_path / "lra_release/lra_release/tsv_data/new_aan_pairs.train.tsv"
    with pytest.raises(DataError, match=r"lacks new_aan_pairs\.train\.tsv"):
        task(tmp_path).prepare()


def test_one_missing_file_is_named_alone(release: Path) -> None:
    (release / "lra_release/lra_release/tsv_data/new_aan_pairs.eval.tsv").unlink()
    assert [entry.what for entry in task(release).check()] == ["new_aan_pairs.eval.tsv"]
    with pytest.raises(DataError, match=r"lacks new_aan_pairs\.eval\.tsv;"):
        task(release).prepare()


def test_the_archive_is_unpacked_when_only_it_is_there(tmp_path: Path) -> None:
    write_release(tmp_path / "source/tsv_data")
    datasets = tmp_path / "datasets"
    datasets.mkdir()
    with tarfile.open(datasets / "lra_release.gz", "w:gz") as tar:
        tar.add(tmp_path / "source/tsv_data", "lra_release/lra_release/tsv_data")
    retrieval = task(datasets)
    assert retrieval.check() == []
    assert retrieval.prepare().counts == {"train": 40, "val": 12, "test": 7}


def test_changed_files_are_encoded_anew(release: Path) -> None:
    before = task(release).prepare()
    path = release / "lra_release/lra_release/tsv_data/new_aan_pairs.test.tsv"
    path.write_bytes(path.read_bytes() + b"1.0\ta\tb\tc\td\n")
    after = task(release).prepare()
    assert after.counts["test"] == before.counts["test"] + 1
    assert after.sha256["train"] == before.sha256["train"]


def test_a_second_preparation_reads_the_cache(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = task(release).prepare()
    monkeypatch.setattr("data.aan.AanFile.__iter__", lambda self: pytest.fail("read again"))
    assert task(release).prepare() == first


def test_a_damaged_cache_entry_is_made_again(release: Path) -> None:
    first = task(release).prepare()
    (tokens,) = (release / "encoded").glob("*/train.tokens.npy")
    raw = bytearray(tokens.read_bytes())
    raw[-1] ^= 1
    tokens.write_bytes(raw)
    assert task(release).prepare() == first
    tokens.write_bytes(tokens.read_bytes()[:-20])
    assert task(release).prepare() == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "aan"}, "official, debian, embedded"),
        ({"vocab_size": 256}, "257"),
        ({"max_len": 0}, "max_len=0"),
        ({"num_val": 0}, "num_val=0"),
        ({"source": "embedded", "max_len": 4001}, "4000 bytes"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task(tmp_path, **changes)


def test_a_subset_is_balanced_seeded_and_part_of_the_whole(tmp_path: Path) -> None:
    limits = {"num_train": 100, "num_val": 31, "num_test": 10_000}
    embedded = {"source": "embedded", "max_len": 64}
    subset, again = (task(tmp_path, **embedded, **limits) for _ in range(2))
    manifest = subset.prepare()
    assert manifest.counts == {"train": 100, "val": 31, "test": 1520}
    assert (manifest.dataset, manifest.stand_in) == ("retrieval-manpages-quick-subset", True)
    assert again.prepare().sha256 == manifest.sha256
    assert task(tmp_path, **embedded, **limits, subset_seed=1).prepare().sha256["train"] != manifest.sha256["train"]
    assert subset.split("train").labels.tolist().count(1) == 50
    assert abs(subset.split("val").labels.tolist().count(1) - 15.5) == 0.5
    whole = rows_of(task(tmp_path, **embedded).split("train"))
    positions = [whole.index(row) for row in rows_of(subset.split("train"))]
    assert positions == sorted(positions)


def rows_of(split: EncodedSplit) -> list[tuple[bytes, bytes, int]]:
    texts = [split.tokens[a:b].tobytes() for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True)]
    return list(zip(texts[::2], texts[1::2], split.labels.tolist(), strict=True))


def test_an_official_subset_is_named_as_one(release: Path) -> None:
    manifest = task(release, num_train=10).prepare()
    assert (manifest.dataset, manifest.stand_in, manifest.counts["train"]) == ("retrieval-subset", True, 10)
    assert task(release, num_val=5).prepare().dataset == "retrieval"


def test_embedded_pairs_are_served_with_their_pages(tmp_path: Path) -> None:
    retrieval = task(tmp_path, source="embedded", max_len=512)
    assert retrieval.check() == []
    manifest = retrieval.prepare()
    assert (manifest.dataset, manifest.stand_in) == ("retrieval-manpages-quick", True)
    texts, pairs = embedded_pairs()
    test = [pair for pair in pairs if pair.split == "test"]
    served = rows_of(retrieval.split("test"))
    expected = [((byte_ids(texts[p.left], 512)), byte_ids(texts[p.right], 512), p.label) for p in test]
    dtype = retrieval.split("test").tokens.dtype
    assert served == [(a.astype(dtype).tobytes(), b.astype(dtype).tobytes(), label) for a, b, label in expected]


def test_debian_packages_are_missing_until_they_are_there(tmp_path: Path) -> None:
    missing = task(tmp_path, source="debian").check()
    assert [entry.what.partition("_")[0] for entry in missing] == ["manpages", "manpages-dev", "freebsd-manpages"]
    assert all(entry.expected_at.parent == tmp_path / "downloads" for entry in missing)


def test_the_writer_lays_out_what_encode_does_and_widens_late_ids(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    for top in (256, 257, 60_000):
        folder = tmp_path / str(top)
        sequences = [rng.integers(0, min(top, 200), rng.integers(0, 50)) for _ in range(20)] + [
            np.array([top - 1]),
            [7],
        ]
        labels = [i % 2 for i in range(11)]
        expected = encode([np.asarray(each) for each in sequences], labels, num_sequences=2)
        with CacheWriter(folder, ["train"], num_sequences=2) as cache:
            for row, label in enumerate(labels):
                cache["train"].append([np.asarray(each) for each in sequences[2 * row : 2 * row + 2]], label)
            counts, sha256 = cache.finish_splits()
            assert (counts, sha256) == ({"train": 11}, {"train": expected.sha256()})
            cache.publish({"counts": counts})
        found = load_cache(folder)
        assert found is not None
        assert found[1]["train"].sha256() == expected.sha256() == split_sha256(folder, "train")
        assert found[1]["train"].tokens.dtype == expected.tokens.dtype


def test_an_interrupted_writer_leaves_nothing_and_a_lost_race_keeps_the_winner(tmp_path: Path) -> None:
    def interrupted() -> None:
        with CacheWriter(tmp_path / "entry", ["train"], num_sequences=1) as cache:
            cache["train"].append([np.array([1])], 0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    for value in (1, 2):
        with CacheWriter(tmp_path / "entry", ["train"], num_sequences=1) as cache:
            cache["train"].append([np.array([value])], 0)
            counts, _ = cache.finish_splits()
            cache.publish({"counts": counts})
    found = load_cache(tmp_path / "entry")
    assert found is not None
    assert found[1]["train"].tokens.tolist() == [1]
    assert load_sound(tmp_path / "absent") is None


def test_the_writer_refuses_the_wrong_number_of_sequences(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", 2)
    with pytest.raises(ValueError, match="has 2 sequences, got 1"):
        writer.append([np.array([1])], 0)
    writer.close()


def test_the_configuration_fits_the_constructor(tmp_path: Path) -> None:
    config = OmegaConf.load(Path(__file__).parents[2] / "conf/task/retrieval.yaml")
    root = OmegaConf.create({"paths": {"datasets": str(tmp_path)}, "task": config})
    keys = OmegaConf.to_container(root.task, resolve=True)
    assert isinstance(keys, dict)
    assert keys.pop("_target_") == "data.retrieval.Retrieval"
    built = Retrieval(**keys)  # type: ignore[arg-type]
    assert (built.source, built.max_len, built.vocab_size) == ("official", 4000, 512)
    root.per_task = {"retrieval": {"source": "embedded", "max_len": 256, "num_train": 10}}
    keys = OmegaConf.to_container(root.task, resolve=True)
    assert (keys["source"], keys["max_len"], keys["num_train"], keys["num_val"]) == ("embedded", 256, 10, None)
