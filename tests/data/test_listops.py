"""ListOps: the text form, the generator, the task and its cache."""

import hashlib
import logging
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from data import listops_generator
from data.base import DataError
from data.listops import ListOps
from data.listops_generator import generate
from data.listops_pool import GENERATOR_VERSION, Grammar, Pool
from data.listops_text import CLOSE, MIN, SM, evaluate, to_source, tokenise

ROOT = Path(__file__).parents[2]
EXAMPLE = "( ( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 7 ) ] ) ) 0 ) ] )"
PUBLISHED = Grammar(max_depth=10, max_args=10, operator_probability=0.25, min_length=500, max_length=2000)
SMALL = {"num_train": 60, "num_val": 20, "num_test": 20}


def settings(datasets: Path, **changes: object) -> dict[str, object]:
    """The constructor's arguments from conf/task/listops.yaml, with changes."""
    config = {"paths": {"datasets": str(datasets)}, "task": OmegaConf.load(ROOT / "conf/task/listops.yaml")}
    arguments = OmegaConf.to_container(OmegaConf.create(config), resolve=True)["task"]
    assert arguments.pop("_target_") == "data.listops.ListOps"
    return arguments | changes


def listops(datasets: Path, **changes: object) -> ListOps:
    return ListOps(**settings(datasets, **changes))


def rows(pool: Pool) -> list[np.ndarray]:
    return np.split(pool.tokens, pool.offsets[1:-1])


@pytest.fixture(scope="module")
def pool() -> Pool:
    return generate(PUBLISHED, 20_000, seed=3, num_workers=2)


def test_the_example_has_the_specified_ids_in_both_modes():
    assert tokenise(EXAMPLE, "x") == [12, 3, 11, 5, 8, 15, 1, 15]
    assert tokenise(EXAMPLE, "none") == [12, 3, 11, 5, 8, 1]
    assert evaluate(EXAMPLE) == 4


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("( ( ( [MED 1 ) 4 ) ] )", 2),
        ("( ( ( ( ( [MED 3 ) 1 ) 2 ) 9 ) ] )", 2),
        ("( ( ( ( [SM 5 ) 9 ) 9 ) ] )", 3),
        ("( ( ( [MIN 7 ) 3 ) ] )", 3),
        ("8", 8),
    ],
)
def test_values_follow_the_published_semantics(source: str, value: int):
    assert evaluate(source) == value


@pytest.mark.parametrize("source", ["", "( 1 2 )", "( [MIN ] )", "( ( [MIN 1 ) ]", "1 2", "( ( [MIN 1 ) ] ) )", "X"])
def test_the_slow_evaluator_refuses_what_is_not_an_expression(source: str):
    with pytest.raises(DataError):
        evaluate(source)


def test_generated_statistics_are_those_of_the_published_generator(pool: Pool):
    lengths = np.diff(pool.offsets)
    assert lengths.min() >= 501
    assert lengths.max() <= 1999
    # 20,000 draws of standard deviation 390: 40 is 14 standard errors; for a share of 0.17, 0.03 is 11.
    assert abs(lengths.mean() - 1039) < 40
    assert abs(np.median(lengths) - 961) < 40
    shares = np.bincount(pool.labels, minlength=10) / len(pool.labels)
    assert np.all(np.abs(shares[[0, 9]] - 0.17) < 0.03)
    assert np.all(np.abs(shares[1:9] - 0.083) < 0.02)  # 10 standard errors
    assert abs(pool.accepted / pool.draws - 0.083) < 0.004  # 7 standard errors
    operators = (pool.tokens >= MIN) & (pool.tokens <= SM)
    assert abs(operators.sum() / len(pool.labels) - 148) < 6
    steps = operators.astype(np.int8) - (pool.tokens == CLOSE)
    assert np.cumsum(steps, dtype=np.int32).max() == 9


def test_every_generated_expression_prints_balanced_and_reparses_to_its_label(pool: Pool):
    for ids, label in zip(rows(pool)[:400], pool.labels[:400], strict=True):
        source = to_source(ids)
        words = source.split()
        operators = int(((ids >= MIN) & (ids <= SM)).sum())
        arguments = len(ids) - operators - 1  # every node but the root is one; an operator is two tokens, a digit one
        assert words.count("(") == words.count(")")
        assert words.count("(") + words.count(")") == 2 * (arguments + operators)
        assert tokenise(source, "x") == ids.tolist()
        assert evaluate(source) == label


def test_a_single_node_follows_the_stated_law():
    grammar = Grammar(max_depth=2, max_args=4, operator_probability=0.25, min_length=0, max_length=100)
    tokens, lengths, labels = listops_generator._draw(grammar, 5, 0)
    count = len(lengths)
    assert count == grammar.draws_per_block  # nothing can be too long
    first = tokens[np.cumsum(lengths) - lengths]
    roots = first[lengths > 1]
    # Six standard errors each: a false alarm in 2e-9 of all seeds, and this seed is fixed.
    assert abs(len(roots) / count - 0.25) < 6 * np.sqrt(0.25 * 0.75 / count)
    for operator in range(MIN, SM + 1):
        assert abs((roots == operator).mean() - 0.25) < 6 * np.sqrt(0.25 * 0.75 / len(roots))
    for arguments in (2, 3, 4):
        share = (lengths[lengths > 1] == arguments + 2).mean()
        assert abs(share - 1 / 3) < 6 * np.sqrt(2 / 9 / len(roots))
    digits = tokens[tokens <= 10]
    for digit in range(10):
        assert abs((digits == digit + 1).mean() - 0.1) < 6 * np.sqrt(0.09 / len(digits))
    assert set(labels[lengths == 1] + 1) == set(range(1, 11))


def test_the_pool_of_a_seed_never_changes():
    pool = generate(PUBLISHED, 300, seed=0, num_workers=1)
    digest = hashlib.sha256(pool.tokens.tobytes() + pool.labels.tobytes()).hexdigest()
    # When this fails on purpose, raise GENERATOR_VERSION: old cache entries hold other bytes.
    assert (GENERATOR_VERSION, digest) == (1, "41f35d9eef93061c2c1c131b8385e1437c723171ceba10eaa8cac493d5d38fa5")


def test_neither_workers_nor_global_random_states_change_a_byte():
    expected = generate(PUBLISHED, 2500, seed=1, num_workers=1)
    for num_workers in (2, 5):
        np.random.seed(num_workers)
        random.seed(num_workers)
        pool = generate(PUBLISHED, 2500, seed=1, num_workers=num_workers)
        for part in ("tokens", "offsets", "labels"):
            assert np.array_equal(getattr(pool, part), getattr(expected, part))
        assert (pool.draws, pool.accepted, pool.duplicates) == (expected.draws, expected.accepted, expected.duplicates)


def test_another_seed_gives_other_expressions_and_a_smaller_pool_is_a_prefix():
    large, small = (generate(PUBLISHED, count, seed=1, num_workers=2) for count in (900, 100))
    assert np.array_equal(large.tokens[: small.offsets[-1]], small.tokens)
    other = generate(PUBLISHED, 100, seed=2, num_workers=2)
    assert not {row.tobytes() for row in rows(other)} & {row.tobytes() for row in rows(large)}


def test_every_expression_of_a_tiny_grammar_is_found_exactly_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listops_generator, "_DRAWS_FOR_FREE", 100_000)
    grammar = Grammar(max_depth=2, max_args=2, operator_probability=0.25, min_length=0, max_length=5)
    pool = generate(grammar, 10 + 4 * 100, seed=0, num_workers=2)
    assert len({row.tobytes() for row in rows(pool)}) == 410
    assert pool.duplicates > 0
    with pytest.raises(DataError, match="410 of them distinct"):
        generate(grammar, 411, seed=0, num_workers=2)


def test_a_length_range_that_nothing_fits_is_refused_with_the_keys_to_change():
    grammar = Grammar(max_depth=10, max_args=10, operator_probability=0.25, min_length=1, max_length=4)
    with pytest.raises(DataError, match=r"task\.min_length=1 .* task\.max_length=4"):
        generate(grammar, 1, seed=0, num_workers=2)


@pytest.mark.parametrize(("min_length", "max_length"), [(0, 2), (10, 100), (50, 60), (1200, 6000)])
def test_any_reachable_length_range_is_met(min_length: int, max_length: int):
    grammar = Grammar(10, 10, 0.25, min_length, max_length)
    lengths = np.diff(generate(grammar, 10, seed=0, num_workers=2).offsets)
    assert lengths.min() > min_length
    assert lengths.max() < max_length


@pytest.mark.parametrize("brackets", ["x", "none"])
def test_the_task_serves_disjoint_splits_of_the_requested_sizes(tmp_path: Path, brackets: str):
    task = listops(tmp_path, brackets=brackets, **SMALL)
    manifest = task.prepare()
    assert manifest.counts == {"train": 60, "val": 20, "test": 20}
    assert (manifest.dataset, manifest.source, manifest.stand_in) == ("listops", "generated", False)
    seen = set()
    for split, count in manifest.counts.items():
        data = task.split(split)
        assert len(data) == count
        assert manifest.sha256[split] == data.sha256()
        assert data.tokens.max() == (15 if brackets == "x" else 14)
        seen |= {data.tokens[a:b].tobytes() for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)}
    assert len(seen) == 100


def test_the_mode_without_brackets_is_the_same_pool_without_x(tmp_path: Path):
    with_x, without = (listops(tmp_path, brackets=brackets, **SMALL).split("val") for brackets in ("x", "none"))
    for index in range(20):
        row = with_x.tokens[with_x.offsets[index] : with_x.offsets[index + 1]]
        bare = without.tokens[without.offsets[index] : without.offsets[index + 1]]
        assert np.array_equal(row[row != CLOSE], bare)
    assert np.array_equal(with_x.labels, without.labels)


def test_too_long_sequences_keep_their_head_or_are_an_error(tmp_path: Path):
    whole, cut = listops(tmp_path, **SMALL).split("test"), listops(tmp_path, max_len=700, **SMALL).split("test")
    assert np.array_equal(cut.lengths(), np.minimum(whole.lengths(), 700))
    for index in range(20):
        head = whole.tokens[whole.offsets[index] : whole.offsets[index + 1]][:700]
        assert np.array_equal(cut.tokens[cut.offsets[index] : cut.offsets[index + 1]], head)
    with pytest.raises(DataError, match=r"example \d+ of train: \d+ tokens where task\.max_len=700"):
        listops(tmp_path, max_len=700, truncate=False, **SMALL).prepare()


def test_every_example_of_a_split_is_served_once(tmp_path: Path):
    task = listops(tmp_path, **SMALL)
    batches = list(task.batches("test", 8))
    assert [len(batch.labels) for batch in batches] == [8, 8, 4]
    lengths = np.concatenate([(~batch.key_padding_mask).sum(-1).numpy() for batch in batches])
    assert np.array_equal(lengths, task.split("test").lengths())


@pytest.mark.parametrize("damage", ["lost manifest", "lost file", "cut file", "empty file", "flipped byte", "no JSON"])
def test_a_damaged_cache_entry_is_reported_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
):
    expected = listops(tmp_path, **SMALL).prepare()
    (folder,) = (tmp_path / "encoded").iterdir()
    file = folder / "val.tokens.npy"
    whole = file.read_bytes()
    if damage == "lost manifest":
        (folder / "manifest.json").unlink()
    elif damage == "no JSON":
        (folder / "manifest.json").write_text("{")
    elif damage == "lost file":
        file.unlink()
    else:
        kept = {"cut file": whole[:-100], "empty file": b"", "flipped byte": whole[:-1] + bytes([whole[-1] ^ 1])}
        file.write_bytes(kept[damage])
    with caplog.at_level(logging.WARNING):
        assert listops(tmp_path, **SMALL).prepare() == expected
    assert "is damaged" in caplog.text
    assert file.read_bytes() == whole
    assert [entry.name for entry in (tmp_path / "encoded").iterdir()] == [folder.name]


def test_a_folder_that_cannot_be_written_is_a_data_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="LRA_DATASETS"):
        listops(tmp_path / "file", **SMALL).prepare()


def test_a_process_that_finds_the_cache_never_imports_numba(tmp_path: Path):
    expected = listops(tmp_path, **SMALL).prepare()
    program = (
        "import sys; from data.listops import ListOps; "
        f"manifest = ListOps(**{settings(tmp_path, **SMALL)}).prepare(); "
        "print('numba' in sys.modules, manifest.sha256['train'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", expected.sha256["train"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "hub"}, "generated, official"),
        ({"brackets": "both"}, "x, none"),
        ({"vocab_size": 15}, "ids up to 15"),
        ({"num_val": 0}, r"task\.num_val=0"),
        ({"min_length": 100, "max_length": 101}, "no length is strictly between"),
        ({"operator_probability": 1.5}, "operator_probability"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_at_construction(tmp_path: Path, change: dict, message: str):
    with pytest.raises(DataError, match=message):
        listops(tmp_path, **change)


def test_the_generated_source_misses_nothing(tmp_path: Path):
    assert listops(tmp_path).check() == []
