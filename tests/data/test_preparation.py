"""Preparation under bad conditions: a full disk, two processes at once, a kill, damaged entries."""

import json
import multiprocessing
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data.base import SPLITS, DataError, Manifest
from data.encoded import encode, load_cache, save_cache, split_sha256
from data.encoded_writer import serve_streamed
from data.entries import load_sound, serve

SEQUENCES = [np.arange(1, 200) for _ in range(400)]


def build(size: int = 400):
    splits = {split: encode(SEQUENCES[:size], [0] * size) for split in SPLITS}
    digests = {split: data.sha256() for split, data in splits.items()}
    return Manifest("t", "t", "generated", False, dict.fromkeys(SPLITS, size), digests), splits


def write(cache, size: int = 400) -> Manifest:
    for split in SPLITS:
        for ids in SEQUENCES[:size]:
            cache[split].append([ids], 0)
    counts, sha256 = cache.finish_splits()
    return Manifest("t", "t", "generated", False, counts, sha256)


WAYS = {
    "in memory": lambda folder, size=400: serve(folder, lambda: build(size)),
    "streamed": lambda folder, size=400: serve_streamed(folder, SPLITS, 1, lambda cache: write(cache, size)),
}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB; the entries of this file take 240."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root; the file-size limit below tests the same way out")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.fixture
def small_files():
    """No file of this process may exceed 32 KiB, so that writing fails as on a full disk (EFBIG for ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_fills_up_leaves_no_entry_and_no_litter(way, small_disk):
    earlier = small_disk / "encoded" / "earlier"
    WAYS[way](earlier, size=10)
    with pytest.raises(DataError, match=r"cannot be written .*No space left.*free some room"):
        WAYS[way](small_disk / "encoded" / "entry")
    assert [path.name for path in (small_disk / "encoded").iterdir()] == ["earlier"]
    assert load_sound(earlier) is not None


@pytest.mark.parametrize("way", WAYS)
def test_a_write_that_fails_half_way_leaves_no_entry_and_is_made_good_later(way, tmp_path, request):
    folder = tmp_path / "encoded" / "entry"
    limit = request.getfixturevalue("small_files")
    assert limit is None
    with pytest.raises(DataError, match=r"cannot be written .*free some room"):
        WAYS[way](folder)
    assert list((tmp_path / "encoded").iterdir()) == []
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    manifest, splits = WAYS[way](folder)
    assert manifest.counts == dict.fromkeys(SPLITS, 400)
    assert splits["train"].sha256() == manifest.sha256["train"]


def _prepare_when_told(way: str, folder: str, gate, results) -> None:
    gate.wait()
    manifest, splits = WAYS[way](Path(folder))
    results.put((manifest.sha256["train"], splits["train"].sha256()))


@pytest.mark.parametrize("way", WAYS)
def test_processes_that_prepare_the_same_entry_at_once_all_get_it(way, tmp_path):
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(4), context.Queue()
    folder = tmp_path / "encoded" / "entry"
    workers = [context.Process(target=_prepare_when_told, args=(way, str(folder), gate, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert len({digest for pair in found for digest in pair}) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["entry"]


def _hang_after_the_first_split(folder: str) -> None:
    def hang(cache):
        for ids in SEQUENCES:
            cache["train"].append([ids], 0)
        cache["train"].finish()
        signal.pause()

    serve_streamed(Path(folder), SPLITS, 1, hang)


def test_a_process_that_is_killed_while_preparing_leaves_nothing_that_is_trusted(tmp_path):
    folder = tmp_path / "encoded" / "entry"
    worker = multiprocessing.get_context("fork").Process(target=_hang_after_the_first_split, args=(str(folder),))
    worker.start()
    for _ in range(2000):
        if list(tmp_path.glob("encoded/.entry.*/train.labels.npy")):
            break
        worker.join(0.01)
    worker.kill()
    worker.join()
    assert not folder.exists()
    manifest, _ = WAYS["streamed"](folder)
    assert manifest.counts["train"] == 400


def damage_manifest(folder: Path, **changes) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["manifest"] |= changes
    (folder / "manifest.json").write_text(json.dumps(content))


DAMAGES = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut": lambda folder: (folder / "manifest.json").write_text('{"num_sequences": 1, "mani'),
    "manifest empty": lambda folder: (folder / "manifest.json").write_text(""),
    "manifest a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest not UTF-8": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{}"),
    "other manifest keys": lambda folder: damage_manifest(folder, colour="red"),
    "a split more": lambda folder: damage_manifest(folder, counts={"train": 400, "extra": 1}),
    "a wrong digest": lambda folder: damage_manifest(folder, sha256={"train": "0" * 64}),
    "tokens missing": lambda folder: (folder / "train.tokens.npy").unlink(),
    "tokens empty": lambda folder: (folder / "train.tokens.npy").write_bytes(b""),
    "tokens cut": lambda folder: (folder / "train.tokens.npy").write_bytes(
        (folder / "train.tokens.npy").read_bytes()[:-9]
    ),
    "labels of another type": lambda folder: np.save(folder / "val.labels.npy", np.zeros(400)),
    "labels pickled": lambda folder: np.save(folder / "val.labels.npy", np.array([{}], dtype=object)),
    "offsets no array": lambda folder: (folder / "test.offsets.npy").write_text("hello"),
    "one bit": lambda folder: flip_last_bit(folder / "train.tokens.npy"),
}


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_reported_and_made_again(damage, tmp_path, caplog):
    folder = tmp_path / "encoded" / "entry"
    WAYS["in memory"](folder, size=400)
    DAMAGES[damage](folder)
    manifest, _ = WAYS["streamed"](folder, size=400)
    assert "is damaged" in caplog.text and str(folder) in caplog.text
    assert manifest.sha256 == {split: split_sha256(folder, split) for split in SPLITS}
    assert [path.name for path in folder.parent.iterdir()] == ["entry"]


def test_a_shared_data_folder_can_be_read_by_colleagues(tmp_path):
    for number, way in enumerate(WAYS):
        WAYS[way](tmp_path / str(number))
        assert (tmp_path / str(number)).stat().st_mode & 0o777 == 0o755


def test_an_entry_in_the_way_that_is_no_entry_is_not_overwritten_silently(tmp_path):
    folder = tmp_path / "entry"
    (folder / "something").mkdir(parents=True)
    manifest, splits = build(10)
    with pytest.raises(OSError, match=r"not empty|exists"):
        save_cache(folder, manifest.as_dict(), splits)
    assert load_cache(folder) is None
