"""The Pathfinder task: what it serves from both sources, from its own YAML files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from data.base import SPLITS, DataError
from data.pathfinder import NAMES, Pathfinder

TASKS = Path(__file__).parents[2] / "conf" / "task"
SMALL = {"num_train": 40, "num_val": 7, "num_test": 9, "contour_length": 6}


def make(datasets: Path, name: str = "pathfinder", **changes) -> Pathfinder:
    node = OmegaConf.load(TASKS / f"{name}.yaml")
    config = OmegaConf.create({"paths": {"datasets": str(datasets)}, "task": OmegaConf.merge(node, changes)})
    return instantiate(config.task)


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Pathfinder:
    task = make(tmp_path_factory.mktemp("datasets"), **SMALL)
    task.prepare()
    return task


def write_release(datasets: Path, count: int = 30) -> Path:
    level = datasets / "lra_release" / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    (level / "metadata").mkdir(parents=True)
    (level / "imgs" / "0").mkdir(parents=True)
    lines = []
    for n in range(count):
        Image.fromarray(np.full((32, 32), n, np.uint8)).save(level / "imgs" / "0" / f"sample_{n}.png")
        lines.append(f"imgs/0 sample_{n}.png {n} {n % 2} 1.0 14 4 2 0.5 1 1\n")
    (level / "metadata" / "0.npy").write_text("".join(lines))
    return level


def everything(task: Pathfinder, split: str) -> tuple[np.ndarray, np.ndarray]:
    batches = list(task.batches(split, 8))
    return np.concatenate([b.tokens.numpy() for b in batches]), np.concatenate([b.labels.numpy() for b in batches])


@pytest.mark.parametrize(("resolution", "name"), NAMES.items())
def test_every_resolution_has_a_task_file_with_the_published_sizes(tmp_path, resolution, name):
    task = make(tmp_path, name)
    assert (task.name, task.max_len, task.num_classes) == (name, resolution**2, 2)
    assert task.limits == {"train": 160_000, "val": 20_000, "test": 20_000}
    assert task.generator.rules.distractor_length == 4
    assert task.generator.rules.num_distractors == {32: 5, 64: 5, 128: 8, 256: 7}[resolution]
    assert task.vocab_size == 512
    assert task.check() == []


def test_generated_images_are_served_row_by_row_without_padding(generated):
    manifest = generated.prepare()
    assert manifest.counts == {"train": 40, "val": 7, "test": 9}
    assert manifest.dataset == "pathfinder-contour6"  # not the benchmark's level
    assert manifest.stand_in
    for split in SPLITS:
        drawn = generated.generator.draw(split, 0, manifest.counts[split])
        tokens, labels = everything(generated, split)
        assert tokens.shape == (manifest.counts[split], 1, 1024)
        np.testing.assert_array_equal(tokens[:, 0], drawn.images.reshape(-1, 1024))
        np.testing.assert_array_equal(labels, drawn.labels)
    assert all(batch.key_padding_mask is None for batch in generated.batches("train", 16))


def test_the_number_of_workers_changes_no_byte_and_no_cache_entry(generated, tmp_path):
    again = make(tmp_path, **SMALL, num_workers=5)
    assert again.prepare() == generated.prepare()
    assert [path.name for path in tmp_path.glob("encoded/*")] == [
        path.name for path in generated.datasets.glob("encoded/*")
    ]


def test_a_smaller_split_is_the_beginning_of_a_larger_one_and_leaves_the_others_alone(generated, tmp_path):
    fewer = make(tmp_path, **SMALL | {"num_train": 12})
    np.testing.assert_array_equal(everything(fewer, "train")[0], everything(generated, "train")[0][:12])
    assert fewer.prepare().sha256["test"] == generated.prepare().sha256["test"]


def test_what_an_interrupted_generation_left_is_used_and_then_removed(generated, tmp_path):
    entry = next(generated.datasets.glob("encoded/pathfinder-*"))
    task = make(tmp_path, **SMALL)
    parts = tmp_path / "encoded" / f".{entry.name}.parts"
    task.generator.write_shards({"train": 40}, parts, num_workers=1)
    shard = next(task.generator.shards({"train": 40}, parts))
    with np.load(shard.path) as arrays:
        marked = dict(arrays)
    marked["images"][0] = 77  # would be drawn otherwise if this shard were not used
    np.savez(shard.path, **marked)
    assert (everything(task, "train")[0][0] == 77).all()
    assert [path.name for path in tmp_path.glob("encoded/*")] == [entry.name]


def test_a_damaged_entry_is_made_again(generated, tmp_path):
    make(tmp_path, **SMALL).prepare()
    tokens = next(tmp_path.glob("encoded/*/train.tokens.npy"))
    content = bytearray(tokens.read_bytes())
    content[-1] ^= 1
    tokens.write_bytes(content)
    again = make(tmp_path, **SMALL)
    assert again.prepare().sha256 == generated.prepare().sha256
    np.testing.assert_array_equal(everything(again, "train")[0], everything(generated, "train")[0])


def test_a_finished_entry_is_served_without_compiler_and_image_library(generated):
    script = (
        "import sys\nfrom pathlib import Path\nfrom test_pathfinder import SMALL, make\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] in ('PIL', 'numba')]: del sys.modules[name]\n"
        f"make(Path({str(generated.datasets)!r}), **SMALL).prepare()\n"
        "assert not {'PIL', 'numba'} & set(sys.modules)\n"
    )
    root, here = Path(__file__).parents[2], Path(__file__).parent
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": f"{root}:{here}"}, timeout=250)


def test_black_pixels_are_masked_only_when_asked(generated):
    quirk = make(generated.datasets, **SMALL, pixel_zero_is_pad=True)
    for plain, masked in zip(generated.batches("val", 4), quirk.batches("val", 4), strict=True):
        assert masked.key_padding_mask.equal(plain.tokens == 0)
        assert masked.tokens.equal(plain.tokens)
    assert next(quirk.batches("train", 4, seed=1)).key_padding_mask.any()


def test_official_images_are_served_once_each_under_their_labels(tmp_path):
    level = write_release(tmp_path)
    (level / "imgs" / "0" / "sample_3.png").write_bytes(b"")
    task = make(tmp_path, source="official")
    manifest = task.prepare()
    assert manifest.counts == {"train": 25, "val": 2, "test": 2}
    assert (manifest.dataset, manifest.stand_in) == ("pathfinder", False)
    assert manifest.details["empty_images_skipped"] == 1
    served = [everything(task, split) for split in SPLITS]
    tokens, labels = (np.concatenate(parts) for parts in zip(*served, strict=True))
    assert sorted(tokens[:, 0, 0]) == [n for n in range(30) if n != 3]
    assert (tokens == tokens[:, :, :1]).all()
    np.testing.assert_array_equal(labels, tokens[:, 0, 0] % 2)


def test_official_splits_can_be_cut_and_follow_their_seed(tmp_path):
    write_release(tmp_path)
    cut = make(tmp_path, source="official", num_train=5, num_val=1, num_test=1)
    assert cut.prepare().counts == {"train": 5, "val": 1, "test": 1}
    whole = make(tmp_path, source="official")
    np.testing.assert_array_equal(everything(cut, "train")[0], everything(whole, "train")[0][:5])
    other = make(tmp_path, source="official", split_seed=1)
    assert other.prepare().sha256["train"] != whole.prepare().sha256["train"]


def test_changed_metadata_is_another_entry(tmp_path):
    level = write_release(tmp_path)
    before = make(tmp_path, source="official").prepare()
    file = level / "metadata" / "0.npy"
    file.write_text(file.read_text().replace("sample_0.png 0 0", "sample_0.png 0 1"))
    assert make(tmp_path, source="official").prepare().sha256 != before.sha256


def test_a_missing_release_is_told_before_anything_is_read(tmp_path):
    task = make(tmp_path, source="official")
    (missing,) = task.check()
    assert missing.expected_at == tmp_path / "lra_release/lra_release/pathfinder32/curv_contour_length_14"
    assert "lra_release.gz" in missing.how_to_get
    assert "task.source=generated" in missing.how_to_get
    with pytest.raises(DataError, match="pathfinder32/curv_contour_length_14"):
        task.prepare()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "hub"}, r"task\.source='hub' is unknown .* generated, official"),
        ({"resolution": 48}, r"task\.resolution=48 is unknown .* 32, 64, 128, 256"),
        ({"vocab_size": 255}, r"task\.vocab_size=255: pathfinder uses 256 ids"),
        ({"num_val": 0}, r"task\.num_val=0: must be at least 1"),
        ({"num_workers": 0}, r"task\.num_workers=0"),
        ({"generator_seed": -1}, r"task\.generator_seed=-1"),
        ({"source": "official", "contour_length": 7}, r"task\.contour_length=7: the release has 6, 9, 14"),
        ({"contour_length": 2}, r"contour_length 2 gives distractors of 0 paddles"),
    ],
)
def test_wrong_values_are_named(tmp_path, changes, message):
    with pytest.raises(Exception, match=message):
        make(tmp_path, **changes)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "encoded").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"encoded/pathfinder-\w+ cannot be written"):
        make(tmp_path, **SMALL).prepare()
