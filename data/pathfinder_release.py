"""Owns the released Pathfinder files: metadata in text or NumPy form, PNG images, and the order they are served in.

<root>/pathfinder32/curv_contour_length_14/{imgs/<k>/sample_<n>.png, metadata/<k>.npy}, root as in data.archive. A
metadata record is: imgs/<k>, sample_<n>.png, n, label, continuity, contour_length, distractor_length, paddle_length,
paddle_thickness, paddle_margin, number of paddle contrasts (drewlinsley/pathfinder snakes2.py:21-26 at ab9c130).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from data.archive import release_folders
from data.base import DataError

READER_VERSION = 1  # part of the cache key; raise it when the bytes change
LEVELS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}
_FOLDER, _FILE, _LABEL = 0, 1, 3  # columns
_NUMPY_MAGIC = b"\x93NUMPY"
_ADVICE = "unpack it from lra_release.gz again"


@dataclass(frozen=True)
class Record:
    """One image: its file, its label, and where that is written (metadata file and line, for messages)."""

    image: Path
    label: int
    where: str


def level_path(resolution: int, contour_length: int) -> str:
    return f"pathfinder{resolution}/{LEVELS[contour_length]}"


def find_level(datasets: Path, resolution: int, contour_length: int) -> Path | None:
    """The folder of one level of difficulty, wherever the release was unpacked, or None."""
    folders = release_folders(datasets, level_path(resolution, contour_length))
    return next((folder for folder in folders if (folder / "metadata").is_dir()), None)


def metadata_files(level: Path) -> list[Path]:
    """In order of their number. Raises DataError for a name that is none, and when there is no file."""
    files = sorted((level / "metadata").glob("*.npy"))
    for file in files:
        if not file.stem.isdecimal():
            raise DataError(f"{file}: the name of a metadata file is a number; remove what does not belong here.")
    if not files:
        raise DataError(f"{level / 'metadata'}: no .npy file; {_ADVICE}.")
    return sorted(files, key=lambda file: int(file.stem))


def metadata_sha256(level: Path) -> str:
    """Over names and bytes of the metadata: what identifies a release in a cache key."""
    digest = hashlib.sha256()
    for file in metadata_files(level):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def read_records(level: Path) -> tuple[list[Record], int]:
    """All records with an image, by (number of the metadata file, line), and how many had an image file of length zero:
    the release has one (curv_baseline/imgs/0/sample_172.png), which every reader skips."""
    records = [record for file in metadata_files(level) for record in _parse(level, file)]
    kept = []
    for record in records:
        try:
            size = record.image.stat().st_size
        except OSError as error:
            raise DataError(f"{record.where}: {record.image} is missing; {_ADVICE}.") from error
        if size:
            kept.append(record)
    return kept, len(records) - len(kept)


def split_records(records: Sequence[Record], split_seed: int) -> dict[str, list[Record]]:
    """A seeded permutation cut into 80 % train, 10 % val and 10 % test (val and test rounded down)."""
    order = np.random.Generator(np.random.PCG64(split_seed)).permutation(len(records))
    tenth = len(records) // 10
    cuts = {"train": order[: len(order) - 2 * tenth], "val": order[len(order) - 2 * tenth : len(order) - tenth]}
    cuts["test"] = order[len(order) - tenth :]
    return {split: [records[i] for i in rows] for split, rows in cuts.items()}


def read_image(record: Record, resolution: int) -> np.ndarray:
    """[resolution, resolution] uint8 grey values. Raises DataError for a damaged file and for another size."""
    from PIL import Image  # here: not for those who find a cache

    try:
        with Image.open(record.image) as picture:
            pixels = np.asarray(picture.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise DataError(f"{record.where}: {record.image} cannot be decoded ({error}); {_ADVICE}.") from error
    if pixels.shape != (resolution, resolution):
        height, width = pixels.shape
        raise DataError(
            f"{record.where}: {record.image} has {width}x{height} pixels, expected {resolution}x{resolution}; "
            "choose the task of that resolution, or bring the right folder."
        )
    return pixels


def _parse(level: Path, file: Path) -> list[Record]:
    content = file.read_bytes()
    rows = _numpy_rows(file) if content.startswith(_NUMPY_MAGIC) else _text_rows(file, content)
    if not rows:
        raise DataError(f"{file}: the file is empty; {_ADVICE}.")
    columns = len(rows[0])
    records = []
    for line, row in enumerate(rows, start=1):
        where = f"{file}, line {line}"
        if len(row) != columns or columns <= _LABEL:
            expected = max(columns, _LABEL + 1)
            raise DataError(f"{where}: {len(row)} columns, expected {expected}; {_ADVICE}.")
        if row[_LABEL] not in ("0", "1"):
            raise DataError(f"{where}: label (column 4) is {row[_LABEL]!r}, expected 0 or 1; {_ADVICE}.")
        image = PurePosixPath(row[_FOLDER]) / row[_FILE]
        if image.is_absolute() or ".." in image.parts:
            raise DataError(f"{where}: {str(image)!r} points outside the release; the file is not trusted.")
        records.append(Record(level / image, int(row[_LABEL]), where))
    return records


def _text_rows(file: Path, content: bytes) -> list[list[str]]:
    try:
        return [line.split() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: neither text nor a NumPy array ({error}); {_ADVICE}.") from error


def _numpy_rows(file: Path) -> list[list[str]]:
    """What the generator itself saves: the same columns as an array of strings (of bytes, under Python 2)."""
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{file}: not a NumPy array of strings ({error}); {_ADVICE}.") from error
    if array.ndim != 2 or array.dtype.kind not in "US":
        raise DataError(
            f"{file}: array of {array.dtype} with shape {array.shape}, expected strings in rows and columns; {_ADVICE}."
        )
    return array.astype(str).tolist()
