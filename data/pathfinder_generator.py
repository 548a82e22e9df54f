"""Owns the making of Pathfinder images: from (settings, seed, index) to pixels, on all cores, shard by shard."""

import logging
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from data.base import DataError
from data.pathfinder_tables import SnakeSettings, Tables

GENERATOR_VERSION = 1  # part of the cache key; raise it when the bytes change
_FIRST_INDEX = {"train": 0, "val": 1 << 40, "test": 2 << 40}  # a split's examples do not depend on another's size
_SHARD_PIXELS = 1 << 20
_SECONDS_BETWEEN_REPORTS = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """N images and how they came about."""

    images: np.ndarray  # [N, R, R] uint8
    labels: np.ndarray  # [N] uint8, 1 when both markers are on one snake
    markers: np.ndarray  # [N, 2, 2] int64, (row, column) of the two marked tips
    restarts: np.ndarray  # [N] int64, attempts at the two snakes that came to nothing
    distractors: np.ndarray  # [N] int64, short snakes that found room

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Shard:
    """Images first .. first + count - 1 of a split, and the file that holds them."""

    split: str
    first: int
    count: int
    path: Path


class Generator:
    """Image number i of a split depends on (settings, resolution, contour_length, seed, split, i) alone."""

    def __init__(self, settings: SnakeSettings, resolution: int, contour_length: int, seed: int) -> None:
        self.settings, self.resolution, self.contour_length, self.seed = settings, resolution, contour_length, seed
        self.rules = settings.rules(resolution, contour_length)

    @cached_property
    def tables(self) -> list[Tables]:
        return [self.settings.tables(self.resolution, margin) for margin in self.settings.paddle_margin_list]

    def draw(self, split: str, first: int, count: int) -> Drawn:
        """Images first .. first + count - 1 of a split. Raises DataError where two snakes find no room."""
        from data.pathfinder_images import draw_images  # here: numba is not for those who find a cache

        drawn = Drawn(
            images=np.zeros((count, self.resolution, self.resolution), np.uint8),
            labels=np.zeros(count, np.uint8),
            markers=np.zeros((count, 2, 2), np.int64),
            restarts=np.zeros(count, np.int64),
            distractors=np.zeros(count, np.int64),
        )
        streams = _streams(self.seed, _FIRST_INDEX[split] + first, count)
        arrays = [getattr(drawn, field.name) for field in fields(drawn)]
        for number, tables in enumerate(self.tables):
            draw_images(tables, self.rules, number, len(self.tables), streams, *arrays)
        if (drawn.restarts < 0).any():
            raise DataError(
                f"pathfinder: two snakes of {self.contour_length} paddles find no room at resolution {self.resolution}; "
                "lower task.contour_length or task.snakes.paddle_length"
            )
        return drawn

    def write_shards(self, counts: Mapping[str, int], folder: Path, num_workers: int) -> None:
        """Draw what `folder` lacks. May be interrupted and called again, also by several processes at once: they share
        the work, and what they do twice is equal."""
        folder.mkdir(parents=True, exist_ok=True)
        todo = [shard for shard in self.shards(counts, folder) if not shard.path.exists()]
        if not todo:
            return
        self.draw("train", 0, 0)  # tables and compiled code, once, before the threads
        turn = os.getpid() % len(todo)
        progress = _Progress(total=sum(shard.count for shard in todo))
        with ThreadPoolExecutor(num_workers, thread_name_prefix="pathfinder") as pool:
            pending = {pool.submit(self._write_shard, shard) for shard in todo[turn:] + todo[:turn]}
            try:
                while pending:
                    done, pending = wait(pending, _SECONDS_BETWEEN_REPORTS, return_when=FIRST_EXCEPTION)
                    progress.add(sum(future.result() for future in done))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def shards(self, counts: Mapping[str, int], folder: Path) -> Iterator[Shard]:
        size = max(64, _SHARD_PIXELS // self.resolution**2)
        for split, total in counts.items():
            for first in range(0, total, size):
                yield Shard(split, first, min(size, total - first), folder / f"{split}-{first:08d}.npz")

    def _write_shard(self, shard: Shard) -> int:
        if shard.path.exists():  # another process was faster
            return shard.count
        drawn = self.draw(shard.split, shard.first, shard.count)
        handle, name = tempfile.mkstemp(prefix=f".{shard.path.stem}.", suffix=".tmp", dir=shard.path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **asdict(drawn))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, shard.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return shard.count


def read_shard(shard: Shard) -> Drawn:
    """What `write_shards` wrote. Raises DataError for a file that is damaged."""
    try:
        with np.load(shard.path, allow_pickle=False) as arrays:
            drawn = Drawn(**{field.name: arrays[field.name] for field in fields(Drawn)})
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{shard.path} is damaged ({error}); delete it and run again") from error
    if len(drawn) != shard.count:
        raise DataError(f"{shard.path} holds {len(drawn)} images, expected {shard.count}; delete it and run again")
    return drawn


def _streams(seed: int, first: int, count: int) -> np.ndarray:
    """[count] uint64: where the random stream of each image starts, SplitMix64's mixer over seed and index."""
    index = np.arange(first, first + count, dtype=np.uint64)
    return _mix(_mix(np.full(count, seed + 1, np.uint64)) ^ index)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class _Progress:
    """Says every few seconds how far the drawing is and how long it still takes."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._start = self._last = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._done < self._total and now - self._last < _SECONDS_BETWEEN_REPORTS:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if self._done else ""
        _logger.info("pathfinder: %s of %s images, %.0f a second%s", f"{self._done:,}", f"{self._total:,}", rate, left)
