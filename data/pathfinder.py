"""Owns the Pathfinder task and Path-X: are two marked points joined by a dashed path (arXiv:1805.08315, 2011.04006)?"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.archive import HOW_TO_GET, extract_release, release_archive
from data.base import SPLITS, DataError, Manifest, Missing
from data.encoded import key_of
from data.encoded_writer import CacheWriter
from data.entries import Prepared, load_sound
from data.pathfinder_generator import GENERATOR_VERSION, Generator, read_shard
from data.pathfinder_release import (
    LEVELS,
    READER_VERSION,
    find_level,
    level_path,
    metadata_sha256,
    read_image,
    read_records,
    split_records,
)
from data.pathfinder_tables import SnakeSettings
from data.pixels import PixelTask

SOURCES = ("generated", "official")
NAMES = {32: "pathfinder", 64: "pathfinder64", 128: "pathx", 256: "pathfinder256"}
BENCHMARK_CONTOUR_LENGTH = 14  # google-research/long-range-arena issue 11: the level "hard"
NUM_IDS = 256

_logger = logging.getLogger(__name__)


class Pathfinder(PixelTask):
    """Two classes: 1 when the two discs mark the ends of one snake, 0 when of two. Ids are grey values 0..255, row by
    row; every image has resolution^2 of them and nothing is padded.

    Sources: "generated", our own generator of the same distribution; "official", the released images.
    """

    num_classes = 2

    def __init__(
        self,
        *,
        source: str,
        datasets: str,
        resolution: int,
        contour_length: int,
        vocab_size: int,
        pixel_zero_is_pad: bool,
        num_train: int,
        num_val: int,
        num_test: int,
        split_seed: int,
        generator_seed: int,
        snakes: SnakeSettings,
        num_workers: int,
    ) -> None:
        """`contour_length`: paddles in each of the two long snakes, the level of difficulty. `num_*`: examples of each
        split, at most so many when official. `split_seed`: the permutation behind the official splits. From
        `generator_seed` on: the generated source only; `num_workers` threads never change a byte."""
        for key, value, choices in (("source", source, SOURCES), ("resolution", resolution, tuple(NAMES))):
            if value not in choices:
                known = ", ".join(map(str, choices))
                raise DataError(f"task.{key}={value!r} is unknown for pathfinder; choose one of {known}")
        if vocab_size < NUM_IDS:
            raise DataError(f"task.vocab_size={vocab_size}: pathfinder uses {NUM_IDS} ids")
        self.limits = {"train": num_train, "val": num_val, "test": num_test}
        sizes = {f"num_{split}": limit for split, limit in self.limits.items()}
        for key, value in (sizes | {"contour_length": contour_length, "num_workers": num_workers}).items():
            if value < 1:
                raise DataError(f"task.{key}={value}: must be at least 1")
        for key, value in {"split_seed": split_seed, "generator_seed": generator_seed}.items():
            if not 0 <= value < 1 << 63:
                raise DataError(f"task.{key}={value}: must be at least 0 and below 2^63")
        if source == "official" and contour_length not in LEVELS:
            levels = ", ".join(map(str, LEVELS))
            raise DataError(f"task.contour_length={contour_length}: the release has {levels}; or use source=generated")
        super().__init__(
            source=source,
            vocab_size=vocab_size,
            max_len=resolution * resolution,
            datasets=datasets,
            pixel_zero_is_pad=pixel_zero_is_pad,
        )
        self.name = NAMES[resolution]
        self.resolution, self.contour_length = resolution, contour_length
        self.split_seed, self.num_workers = split_seed, num_workers
        self.generator = Generator(snakes, resolution, contour_length, generator_seed)

    def check(self) -> list[Missing]:
        if self.source == "generated" or self._level() or release_archive(self.datasets):
            return []
        path = level_path(self.resolution, self.contour_length)
        how = f"{HOW_TO_GET}, or generate the same distribution with task.source=generated"
        return [Missing(path, self.datasets / "lra_release" / "lra_release" / path, how)]

    def _level(self) -> Path | None:
        return find_level(self.datasets, self.resolution, self.contour_length)

    def entries(self) -> list[Path]:
        if self.source == "official" and self._level() is None:
            return []
        return [self._entry(self._parameters())]

    def _entry(self, parameters: dict[str, Any]) -> Path:
        return self.datasets / "encoded" / f"pathfinder-{key_of(parameters)}"

    def _prepare(self) -> Prepared:
        if missing := self.check():
            raise DataError(f"pathfinder: missing {missing[0].expected_at}; {missing[0].how_to_get}")
        parameters = self._parameters()
        folder = self._entry(parameters)
        build = self._write_official if self.source == "official" else self._write_generated
        found = load_sound(folder)
        if found is None:
            self._build(folder, parameters, build)
            found = load_sound(folder)
        if found is None:
            raise DataError(f"{folder} does not hold what was just written to it; check the disk")
        return found

    def _build(
        self, folder: Path, parameters: dict[str, Any], build: Callable[[CacheWriter, Path], dict[str, Any]]
    ) -> None:
        parts = folder.with_name(f".{folder.name}.parts")
        try:
            with CacheWriter(folder, SPLITS, num_sequences=1) as cache:
                details = build(cache, parts)
                counts, sha256 = cache.finish_splits()
                ones = {split: round(float(cache[split].labels().mean()), 4) for split in SPLITS}
                manifest = Manifest(
                    task=self.name,
                    dataset=self._dataset(),
                    source=self.source,
                    stand_in=self.contour_length != BENCHMARK_CONTOUR_LENGTH,
                    counts=counts,
                    sha256=sha256,
                    details={"parameters": parameters, "label_mean": ones} | details,
                )
                cache.publish(manifest.as_dict())
        except OSError as error:
            if (folder / "manifest.json").is_file():  # another process finished it and took the parts away
                return
            raise DataError(
                f"{folder} cannot be written ({error}); free some room, or point paths.datasets to a writable folder"
            ) from error
        shutil.rmtree(parts, ignore_errors=True)

    def _dataset(self) -> str:
        hard = self.contour_length == BENCHMARK_CONTOUR_LENGTH
        return self.name if hard else f"{self.name}-contour{self.contour_length}"

    def _parameters(self) -> dict[str, Any]:
        """All that the encoded bytes depend on."""
        served = {
            "task": "pathfinder",
            "source": self.source,
            "resolution": self.resolution,
            "contour_length": self.contour_length,
            "limits": self.limits,
        }
        if self.source == "generated":
            generator = self.generator
            return served | {
                "generator_version": GENERATOR_VERSION,
                "seed": generator.seed,
                "snakes": generator.settings.as_dict(),
            }
        return served | {
            "reader_version": READER_VERSION,
            "split_seed": self.split_seed,
            "metadata_sha256": metadata_sha256(self._official_level()),
        }

    def _official_level(self) -> Path:
        """Unpacks the release first when only the archive is there."""
        level, archive = self._level(), release_archive(self.datasets)
        if level is None and archive is not None:
            extract_release(archive, self.datasets, only=(f"pathfinder{self.resolution}",))
            level = self._level()
        if level is None:
            path = level_path(self.resolution, self.contour_length)
            raise DataError(f"{archive}: holds no folder {path}; is it the release of the benchmark?")
        return level

    def _write_generated(self, cache: CacheWriter, parts: Path) -> dict[str, Any]:
        """Draw the shards that `parts` lacks, then lay them end to end."""
        self.generator.write_shards(self.limits, parts, self.num_workers)
        restarts, distractors = [], []
        for shard in self.generator.shards(self.limits, parts):
            drawn = read_shard(shard)
            for image, label in zip(drawn.images, drawn.labels, strict=True):
                cache[shard.split].append([image.reshape(-1)], int(label))
            restarts.append(drawn.restarts)
            distractors.append(drawn.distractors)
        return {
            "mean_restarts": round(float(np.concatenate(restarts).mean()), 2),
            "mean_distractors": round(float(np.concatenate(distractors).mean()), 4),
            "wanted_distractors": self.generator.rules.num_distractors,
        }

    def _write_official(self, cache: CacheWriter, parts: Path) -> dict[str, Any]:
        level = self._official_level()
        records, empty = read_records(level)
        for split, members in split_records(records, self.split_seed).items():
            if not members:
                raise DataError(f"{level}: {len(records)} images are too few to split; unpack lra_release.gz again")
            for number, record in enumerate(members[: self.limits[split]]):
                if number % 20_000 == 0:
                    _logger.info("pathfinder: %s, image %s of %s", split, f"{number:,}", f"{len(members):,}")
                cache[split].append([read_image(record, self.resolution).reshape(-1)], record.label)
        return {
            "folder": str(level.relative_to(self.datasets)),
            "records": len(records),
            "empty_images_skipped": empty,
        }
