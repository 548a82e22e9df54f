"""The Pathfinder generator against its definition in plain NumPy, and its promises about workers and interruptions."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data import pathfinder_images as images
from data import pathfinder_snakes as snakes
from data.base import DataError
from data.pathfinder_generator import Drawn, Generator, _streams, read_shard
from data.pathfinder_statistics import statistics
from data.pathfinder_tables import NUM_HEADINGS, SnakeSettings

TASKS = Path(__file__).parents[2] / "conf" / "task"


def settings(name: str = "pathfinder", **changes) -> SnakeSettings:
    """As published: those of the task's own file."""
    return replace(instantiate(OmegaConf.load(TASKS / f"{name}.yaml").snakes), **changes)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(settings(), 32, 14, seed=0)


@pytest.fixture(scope="module")
def sample(generator) -> Drawn:
    return generator.draw("train", 0, 5000)


def assert_equal(one: Drawn, other: Drawn) -> None:
    for field in fields(Drawn):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


@pytest.fixture(scope="module")
def partly_filled() -> np.ndarray:
    """A mask with a border and some occupied spots of every level."""
    mask = np.zeros((32, 32), np.uint8)
    mask[[0, -1]] = mask[:, [0, -1]] = 255
    rng = np.random.default_rng(3)
    mask[tuple(rng.integers(0, 32, (2, 60)))] = rng.integers(1, 256, 60)
    return mask


def test_an_image_depends_on_seed_split_and_index_alone(generator, sample):
    part = generator.draw("train", 100, 7)
    for field in fields(Drawn):
        np.testing.assert_array_equal(getattr(part, field.name), getattr(sample, field.name)[100:107])
    assert (generator.draw("val", 100, 7).images != part.images).any(axis=(1, 2)).all()
    other = Generator(settings(), 32, 14, seed=1).draw("train", 100, 7)
    assert (other.images != part.images).any(axis=(1, 2)).all()


def test_any_number_of_workers_and_an_interruption_give_the_same_bytes(generator, tmp_path):
    counts = {"train": 1500, "val": 3, "test": 70}
    generator.write_shards(counts, tmp_path / "one", num_workers=1)
    generator.write_shards(counts, tmp_path / "four", num_workers=4)
    shards = [list(generator.shards(counts, tmp_path / name)) for name in ("one", "four")]
    assert [shard.count for shard in shards[0]] == [1024, 476, 3, 70]
    lost, kept = shards[1][1].path, shards[1][0].path
    lost.unlink()
    before = kept.stat().st_mtime_ns
    generator.write_shards(counts, tmp_path / "four", num_workers=2)
    assert kept.stat().st_mtime_ns == before  # what was there was not drawn again
    for one, four in zip(*shards, strict=True):
        assert_equal(read_shard(one), read_shard(four))
    assert {path.suffix for path in (tmp_path / "four").iterdir()} == {".npz"}


def test_a_damaged_shard_is_named(generator, tmp_path):
    counts = {"train": 2, "val": 1, "test": 1}
    generator.write_shards(counts, tmp_path, num_workers=1)
    shard = next(generator.shards(counts, tmp_path))
    shard.path.write_bytes(shard.path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train-00000000.npz is damaged .* delete it"):
        read_shard(shard)


def test_every_image_is_stretched_to_the_whole_range(sample):
    assert (sample.images.min(axis=(1, 2)) == 0).all()
    assert (sample.images.max(axis=(1, 2)) == 255).all()


def test_markers_are_inside_the_border_and_bright(sample):
    rows = np.arange(len(sample))
    for end in range(2):
        y, x = sample.markers[:, end].T
        assert ((y >= 1) & (y < 31) & (x >= 1) & (x < 31)).all()
        assert (sample.images[rows, y, x] >= 127).all()  # 1.0 of a distractor's 2.0, at most


def test_labels_are_a_fair_coin_and_nothing_simple_but_the_distance_of_the_markers_predicts_them(sample):
    found = statistics(**asdict(sample))
    # Six standard errors: false alarms below 1e-8 each.
    assert abs(found["label_mean"] - 0.5) < 6 * 0.5 / len(sample) ** 0.5
    for shortcut in ("shortcut_brightness", "shortcut_histogram"):
        assert abs(found[shortcut] - 0.5) < 6 * found["shortcut_standard_error"], shortcut
    # The generator itself brings this one: 0.546 of 60,000 images.
    assert abs(found["shortcut_marker_distance"] - 0.546) < 6 * found["shortcut_standard_error"]


def test_the_images_look_like_those_of_the_published_generator(sample):
    """Means over 3,000 images of its code at ab9c130 under a current OpenCV and Pillow. Bounds: six standard errors of
    the difference, from both samples' spread; false alarms below 1e-8 each."""
    published = {
        "brightness": (20.126, 1.948, sample.images.mean(axis=(1, 2))),
        "ink": (0.12541, 0.0116, (sample.images >= 64).mean(axis=(1, 2))),
        "distractors": (1.1317, 0.905, sample.distractors),
        "restarts": (336.8, 337.0, sample.restarts),
        "marker distance": (12.900, 5.04, np.linalg.norm(np.diff(sample.markers.astype(float), axis=1)[:, 0], axis=1)),
    }
    for name, (mean, spread, values) in published.items():
        error = (spread**2 / 3000 + values.var() / len(values)) ** 0.5
        assert abs(values.mean() - mean) < 6 * error, name


@pytest.mark.parametrize(
    ("name", "resolution", "margin", "blocked"),
    [("pathfinder", 32, 1, 330), ("pathfinder64", 64, 1, 265), ("pathx", 128, 2, 6), ("pathx", 128, 3, 0)],
)
def test_the_border_blocks_the_headings_that_opencv_blocks(name, resolution, margin, blocked):
    """Counts measured with OpenCV: the dilation of an empty image holds a value below zero."""
    tables = settings(name).tables(resolution, margin)
    assert tables.blocked.sum() == blocked
    for heading in range(0, NUM_HEADINGS, 7):  # the definition: a tail whose whole footprint is outside
        footprint = tables.footprint[heading, : tables.footprint_size[heading]]
        tails = np.stack(np.mgrid[:resolution, :resolution], axis=-1)[:, :, None] + footprint
        inside = ((tails >= 0) & (tails < resolution)).all(axis=-1).any(axis=-1)
        assert tables.blocked[heading] == (not inside.all())


def test_headings_that_the_border_blocks_are_back_when_the_key_is_off(sample):
    free = Generator(settings(border_blocks_heading=False), 32, 14, seed=0)
    assert not free.tables[0].blocked.any()
    drawn = free.draw("train", 0, 500)
    assert drawn.distractors.mean() > 4 > 2 > sample.distractors.mean()  # of 5


def test_a_first_paddle_is_put_exactly_where_its_footprint_is_free(generator, partly_filled):
    tables, frame = generator.tables[0], 2
    taken = partly_filled >= 77
    taken[:frame] = taken[-frame:] = taken[:, :frame] = taken[:, -frame:] = True
    for heading in range(0, NUM_HEADINGS, 11):
        footprint = tables.footprint[heading, : tables.footprint_size[heading]]
        expected = np.ones((32, 32), bool)
        for y, x in np.ndindex(32, 32):
            for dy, dx in footprint:
                if 0 <= y + dy < 32 and 0 <= x + dx < 32 and taken[y + dy, x + dx]:
                    expected[y, x] = False
        found = [[snakes._is_free(footprint, partly_filled, frame, y, x) for x in range(32)] for y in range(32)]
        np.testing.assert_array_equal(found, expected)
        state = np.array([heading + 1], np.uint64)
        for _ in range(5):
            y, x = snakes._free_place(footprint, partly_filled, frame, state)
            assert expected[y, x] if expected.any() else (y, x) == (-1, -1)


def test_candidates_are_weighed_by_continuity_and_by_the_room_about_them(generator, partly_filled):
    tables, continuity, radius = generator.tables[0], 1.0, 3
    circle = np.arange(0, 360, 360 / (2 * np.pi * radius)) * np.pi / 180
    for last, pivot in [(10, (5, 7)), (200, (16, 16)), (NUM_HEADINGS + 3, (29, 2)), (NUM_HEADINGS + 9, (-1, 40))]:
        angle = (last - 180) * np.pi / 180
        if last >= NUM_HEADINGS:
            angle = np.arctan2(*tables.candidates[last - NUM_HEADINGS])
        expected = {}
        for y, x in np.stack([pivot[0] + radius * np.sin(circle), pivot[1] + radius * np.cos(circle)], axis=-1):
            if not (0 <= y < 32 and 0 <= x < 32):
                continue
            y, x = int(y), int(x)
            turn = abs(np.arctan2(y - pivot[0], x - pivot[1]) - angle)
            weight = np.cos(min(continuity * min(turn, 2 * np.pi - turn), np.pi / 2)) ** 2
            around = [(y + dy, x + dx) for dy, dx in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))]
            room = 1 - max(partly_filled[p] for p in around if min(p) >= 0 and max(p) < 32) / 255
            expected[y - pivot[0], x - pivot[1]] = weight * room
        running = np.zeros(len(tables.candidates))
        total = snakes._weigh(
            tables.candidates, tables.weights[last], tables.near, partly_filled, np.array(pivot), running
        )
        weights = np.diff(running, prepend=0.0)
        np.testing.assert_allclose(
            weights, [expected.get(tuple(place), 0.0) for place in tables.candidates], rtol=0, atol=1e-12
        )
        assert total == pytest.approx(sum(expected.values()), abs=1e-12)


@pytest.mark.parametrize("place", [(0, 0), (31, 4), (12, 20), (30, 30)])
def test_occupancy_is_a_maximum_and_a_crossing_is_a_sum_of_at_least_1_8(generator, partly_filled, place):
    sprite = generator.tables[0].mask[77]
    reach = len(sprite) // 2
    layer = np.zeros((32 + 2 * reach, 32 + 2 * reach), np.uint8)
    layer[place[0] : place[0] + 2 * reach + 1, place[1] : place[1] + 2 * reach + 1] = sprite
    layer = layer[reach:-reach, reach:-reach]
    crosses = (partly_filled.astype(int) + layer).max() >= 1.8 * 255
    assert snakes._crosses(partly_filled, sprite, *place) == crosses
    mask = partly_filled.copy()
    snakes._commit(mask, sprite, *place)
    np.testing.assert_array_equal(mask, np.maximum(partly_filled, layer))


def test_both_snakes_have_full_length_and_advance_by_one_paddle_each_time(generator):
    rules, tables = generator.rules, generator.tables[0]
    state, mask = np.array([5], np.uint64), np.zeros((32, 32), np.uint8)
    paddles = np.zeros((2, 14, 3), np.int64)
    found = 0
    for _ in range(20_000):
        paddles[:] = -1
        if not snakes.two_snakes(tables, rules, state, mask, paddles):
            continue
        found += 1
        assert (paddles[..., :2] >= 0).all()
        assert (paddles[..., :2] < 32).all()
        first, second = paddles[:, 0, :2]
        assert abs(np.linalg.norm(first - second) - 7) <= 1  # seed_distance
        assert (first >= 13).all()
        assert (first <= 18).all()  # twice seed_distance from the edges
        heads = np.linalg.norm(np.diff(paddles[:, 1:, :2], axis=1), axis=-1)
        assert heads.min() > 0
        assert heads.max() <= 3 + 4 + 3  # a stride between two circles of radius length + margin
    assert found > 20  # of some 60


def test_label_1_marks_both_ends_of_one_snake_and_label_0_ends_of_two(generator, sample):
    mask, paddles = np.zeros((32, 32), np.uint8), np.zeros((2, 14, 3), np.int64)
    seen = set()
    for n, stream in enumerate(_streams(seed=0, first=0, count=60)):
        state = np.array([stream])
        assert snakes.below(state, 2) == sample.labels[n]
        snakes.below(state, 1)  # the margin
        while not snakes.two_snakes(generator.tables[0], generator.rules, state, mask, paddles):
            pass
        tails, heads = paddles[:, 0, :2].tolist(), paddles[:, -1, :2].tolist()
        assert heads[0] != heads[1]
        origin, terminal = tails.index(sample.markers[n, 0].tolist()), heads.index(sample.markers[n, 1].tolist())
        assert (origin == terminal) == bool(sample.labels[n])
        seen.add((origin, terminal))
    assert len(seen) == 4


def test_a_distractor_takes_its_place_and_one_that_fails_leaves_no_trace(generator):
    state, trial, canvas = np.array([1], np.uint64), np.zeros((32, 32), np.uint8), np.zeros((32, 32))
    mask, paddles = np.zeros((32, 32), np.uint8), np.zeros((4, 3), np.int64)
    outcomes = []
    for _ in range(60):
        mask_before, canvas_before = mask.copy(), canvas.copy()
        done = images._add_distractor(generator.tables[0], generator.rules, state, canvas, mask, trial, paddles)
        assert (mask >= mask_before).all()
        assert (mask > mask_before).any() == (canvas > canvas_before).any() == done
        outcomes.append(done)
    assert any(outcomes)
    assert not all(outcomes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paddle_margin_list": []}, "paddle_margin_list"),
        ({"snake_contrast_list": [0]}, "snake_contrast_list"),
        ({"seed_distance": 8}, "seed_distance 8"),
        ({"padding": 0}, "padding is 0"),
        ({"distractor_length": 0}, "distractors of 0 paddles"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(DataError, match=message):
        Generator(settings(**changes), 32, 14, seed=0)


def test_snakes_that_find_no_room_are_an_error_and_not_an_endless_loop():
    with pytest.raises(DataError, match="two snakes of 90 paddles find no room"):
        Generator(settings(), 32, 90, seed=0).draw("train", 0, 1)


def test_margins_and_contrasts_are_drawn_from_their_lists():
    count = 400

    def drawn(**changes) -> Drawn:
        return Generator(settings(**changes), 32, 6, seed=0).draw("train", 0, count)

    plain = drawn()
    twice = drawn(paddle_margin_list=[1, 1], snake_contrast_list=[2, 2], paddle_contrast_list=[0.75, 0.75])
    np.testing.assert_array_equal(twice.images, plain.images)
    same = (drawn(paddle_margin_list=[1, 2]).images == plain.images).all(axis=(1, 2))
    assert abs(same.mean() - 0.5) < 6 * 0.5 / count**0.5  # false alarm below 1e-8
    for changes in ({"snake_contrast_list": [2, 1]}, {"paddle_contrast_list": [0.75, 0.3]}):
        other = drawn(**changes)
        np.testing.assert_array_equal(other.markers, plain.markers)  # the same places, other greys
        assert (other.images != plain.images).any(axis=(1, 2)).mean() > 0.8
