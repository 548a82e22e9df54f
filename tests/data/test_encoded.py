"""Batches from the encoded cache: gathered right, the same wherever they are gathered, in an order of (seed, step)."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from data.base import bucketed_indices, stream_indices
from data.encoded import EncodedSplit, encode
from data.resident import ResidentSplit

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def random_split(num_sequences: int, largest: int, same_length: bool = False) -> EncodedSplit:
    draw = np.random.Generator(np.random.PCG64(largest))
    lengths = np.full(60, 7) if same_length else draw.integers(0, 12, 60)
    return encode(
        [draw.integers(1, largest, n) for n in lengths], draw.integers(0, 9, 60 // num_sequences), num_sequences
    )


@pytest.mark.parametrize("largest", [200, 300, 65000])
@pytest.mark.parametrize("num_sequences", [1, 2])
@pytest.mark.parametrize("pad_to", [None, 15])
def test_a_resident_split_gathers_what_the_memory_map_gathers(largest, num_sequences, pad_to):
    split = random_split(num_sequences, largest)
    resident = ResidentSplit(split, CPU)
    for index in (np.array([3]), np.arange(len(split)), np.array([5, 5, 0, 29])):
        tokens, mask, labels = split.gather(index, pad_to)
        on_device = resident.gather(index, pad_to)
        assert on_device[0].dtype == on_device[2].dtype == torch.int64
        assert np.array_equal(tokens, on_device[0].numpy())
        assert np.array_equal(labels, on_device[2].numpy())
        assert (mask is None) == (on_device[1] is None)
        assert mask is None or np.array_equal(mask, on_device[1].numpy())


def test_a_batch_without_padding_has_no_mask_wherever_it_is_gathered():
    split = random_split(1, 200, same_length=True)
    assert split.gather(np.arange(4), None)[1] is None
    assert ResidentSplit(split, CPU).gather(np.arange(4), None)[1] is None


def test_gather_equals_the_loop_over_examples():
    split = random_split(2, 300)
    index = np.array([7, 0, 29])
    tokens, mask, labels = split.gather(index, 20)
    for place, example in enumerate(index):
        for sequence in range(2):
            first, last = split.offsets[example * 2 + sequence : example * 2 + sequence + 2]
            expected = np.zeros(20, dtype=np.int64)
            expected[: last - first] = split.tokens[first:last]
            assert np.array_equal(tokens[place, sequence], expected)
            assert np.array_equal(mask[place, sequence], np.arange(20) >= last - first)
        assert labels[place] == split.labels[example]


def test_a_task_serves_the_same_batches_from_a_device(counting_task):
    from itertools import islice

    before = list(islice(counting_task.batches("train", 16, seed=3), 6)) + list(counting_task.batches("test", 16))
    counting_task.hold_on(CPU)
    after = list(islice(counting_task.batches("train", 16, seed=3), 6)) + list(counting_task.batches("test", 16))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.labels, other.labels)
        assert one.key_padding_mask is other.key_padding_mask is None or torch.equal(
            one.key_padding_mask, other.key_padding_mask
        )


def pool_of(num_examples: int, batch_size: int) -> int:
    return max(1, min(50, num_examples // batch_size))


@pytest.mark.parametrize(("num_examples", "batch_size"), [(1000, 8), (103, 10), (10, 16), (7, 7)])
def test_bucketing_serves_every_example_once_per_epoch_as_the_plain_stream_does(num_examples, batch_size):
    longest = np.random.Generator(np.random.PCG64(1)).integers(1, 500, num_examples)
    steps = pool_of(num_examples, batch_size) * 3
    plain = np.concatenate([stream_indices(num_examples, batch_size, 5, step) for step in range(steps)])
    bucketed = np.concatenate([bucketed_indices(longest, batch_size, 5, step) for step in range(steps)])
    assert np.array_equal(np.bincount(plain, minlength=num_examples), np.bincount(bucketed, minlength=num_examples))


def test_bucketed_order_depends_on_seed_and_step_alone():
    longest = np.random.Generator(np.random.PCG64(1)).integers(1, 500, 1000)
    forwards = [bucketed_indices(longest, 8, 5, step) for step in range(120)]
    backwards = [bucketed_indices(longest, 8, 5, step) for step in reversed(range(120))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not np.array_equal(forwards[0], bucketed_indices(longest, 8, 6, 0))


def test_a_bucketed_stream_goes_on_where_it_was_left(counting_task):
    from itertools import islice

    def stream(start):
        return counting_task.batches("train", 16, seed=3, start=start, length_bucketing=True)

    for one, other in zip(list(islice(stream(0), 40))[23:], islice(stream(23), 17), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.labels, other.labels)


def test_bucketing_cuts_padding_and_does_not_serve_lengths_in_order():
    longest = np.random.Generator(np.random.PCG64(1)).integers(1, 500, 4000)
    batches = [longest[bucketed_indices(longest, 8, 5, step)] for step in range(500)]
    plain = [longest[stream_indices(4000, 8, 5, step)] for step in range(500)]

    def padding(rows):
        return sum(row.max() * len(row) - row.sum() for row in rows)

    assert padding(batches) < 0.1 * padding(plain)
    means = np.array([row.mean() for row in batches[:50]])
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.6  # seeded: sorted batches would give 1


def test_no_array_is_ever_loaded_with_pickles():
    """np.load is called with allow_pickle=False, spelled out; nothing else unpickles data."""
    calls = 0
    for path in sorted((ROOT / "data").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "")]
                assert not {"pickle", "dill", "joblib"} & set(names), path
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("load", "save", "savez") and ast.unparse(node.func.value) == "np":
                calls += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("allow_pickle") == "False", f"{path}:{node.lineno}"
    assert calls >= 3
