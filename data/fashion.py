"""Owns Fashion-MNIST (arXiv:1708.07747) as the stand-in of CIFAR-10: the Debian package, the committed part, and the way
a 28x28 image takes its place in a 32x32 field."""

import gzip
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data.base import SPLITS, DataError
from data.sources import fetch_debian, require_sha256, unpack_debian
from data.subsets import index_sha256

NUM_CLASSES = 10
SIDE, FIELD = 28, 32
VAL_PER_CLASS = 600  # the last of each class in the train file
VAL_ROWS_SHA256 = "5af1facefb110b6a7fd0a6a051b4a7cf5eb8b50879787488fce28e27cf82725e"
FILE_ROWS = {"train": 60000, "test": 10000}
COUNTS = {"train": 54000, "val": 6000, "test": 10000}
PLACEMENT_SEEDS = {"train": 0, "test": 1}

PACKAGE = "dataset-fashion-mnist"
PACKAGE_VERSION = "0.0~git20200523.55506a9-1"
PACKAGE_SHA256 = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FILES = {  # IDX files and what they are known by
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}

EMBEDDED = Path(__file__).parent / "embedded" / "fashion.parquet"
EMBEDDED_SHA256 = "a3ee72d14717cc7539ea1f9d966fc29870c3748d93827c35612a727fea78f2f2"
EMBEDDED_COUNTS = {"train": 4000, "val": 1000, "test": 1000}


@dataclass(frozen=True)
class FashionSplit:
    """images [N, 28, 28] uint8, 0 = black background; labels [N]; rows [N], the numbers in the file it came from."""

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


def find_folder(downloads: Path) -> Path | None:
    """Where the four IDX files lie: brought by hand, unpacked earlier, or installed by the system's package."""
    places = (downloads / "fashion-mnist", downloads / PACKAGE / INSTALLED.relative_to("/"), INSTALLED)
    return next((place for place in places if all((place / name).is_file() for name in FILES)), None)


def fetch_folder(downloads: Path) -> Path:
    """The folder of the four IDX files; the package is fetched and unpacked where there is none. Raises DataError."""
    if (folder := find_folder(downloads)) is not None:
        return folder
    deb = fetch_debian(PACKAGE, PACKAGE_VERSION, PACKAGE_SHA256, downloads)
    with tempfile.TemporaryDirectory(prefix=".unpack.", dir=downloads) as temporary:
        unpack_debian(deb, Path(temporary) / PACKAGE)
        if not (downloads / PACKAGE).exists():
            os.rename(Path(temporary) / PACKAGE, downloads / PACKAGE)
    folder = find_folder(downloads)
    if folder is None:
        raise DataError(f"{deb}: holds not all of {', '.join(FILES)}; delete {downloads / PACKAGE} and prepare again")
    return folder


def read_folder(folder: Path) -> dict[str, FashionSplit]:
    """54,000 / 6,000 / 10,000 images out of the four files. Raises DataError for anything but the pinned bytes."""
    for name, sha256 in FILES.items():
        require_sha256(folder / name, sha256)
    images, labels = (read_idx(folder / f"train-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    test_images, test_labels = (read_idx(folder / f"t10k-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    kept, held = split_rows(labels)
    if index_sha256(held) != VAL_ROWS_SHA256:
        raise DataError(f"{folder}: the validation rows have SHA-256 {index_sha256(held)}, expected {VAL_ROWS_SHA256}")
    splits = {
        "train": FashionSplit(images[kept], labels[kept], kept),
        "val": FashionSplit(images[held], labels[held], held),
        "test": FashionSplit(test_images, test_labels, np.arange(len(test_labels))),
    }
    counts = {name: len(split.labels) for name, split in splits.items()}
    if counts != COUNTS:
        raise DataError(f"{folder}: {counts} images, expected {COUNTS}")
    return splits


def split_rows(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows (train, validation): the last VAL_PER_CLASS of each class, in file order, are validation."""
    held = np.sort(np.concatenate([np.flatnonzero(labels == label)[-VAL_PER_CLASS:] for label in range(NUM_CLASSES)]))
    return np.setdiff1d(np.arange(len(labels)), held, assume_unique=True), held


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped IDX file: magic 0, type 0x08, number of dimensions, big-endian dimensions, bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
        zero, kind, num_dims = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{num_dims}I", content, 4)
        values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * num_dims)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise DataError(f"{path}: not a whole gzipped IDX file ({error}); delete it and prepare again") from error
    if zero != 0 or kind != 0x08 or values.size != np.prod(shape):
        raise DataError(f"{path}: IDX header 0x{kind:02x} {shape} does not fit {values.size} bytes of data")
    return values.reshape(shape)


def read_embedded() -> dict[str, FashionSplit]:
    """The committed, class-balanced part: 4,000 / 1,000 / 1,000 images. Raises DataError when the file was changed."""
    if not EMBEDDED.is_file():
        raise DataError(f"{EMBEDDED} is missing: it is part of the repository, check it out again")
    require_sha256(EMBEDDED, EMBEDDED_SHA256)
    table = pq.ParquetFile(EMBEDDED).read()
    split_of = np.asarray(table["split"].to_pylist())
    labels, rows = (table[name].to_numpy().astype(np.int64) for name in ("label", "row"))
    images = np.frombuffer(b"".join(table["image"].to_pylist()), dtype=np.uint8).reshape(-1, SIDE, SIDE)
    masks = {name: split_of == name for name in SPLITS}
    return {name: FashionSplit(images[mask], labels[mask], rows[mask]) for name, mask in masks.items()}


def place(split: FashionSplit, file: str, shift_flip: bool) -> np.ndarray:
    """[N, 32, 32] uint8 on black. Centred; or, with `shift_flip`, at an offset of 0..4 down and right and mirrored with
    probability 1/2, drawn once per row of the file ("train" or "test"): raw pixels are then less nearly linear."""
    down = right = np.full(len(split.rows), (FIELD - SIDE) // 2)
    images = split.images
    if shift_flip:
        generator = np.random.Generator(np.random.PCG64(PLACEMENT_SEEDS[file]))
        offsets = generator.integers(0, FIELD - SIDE + 1, size=(FILE_ROWS[file], 2))
        mirrored = generator.random(FILE_ROWS[file])[split.rows] < 0.5
        down, right = offsets[split.rows].T
        images = np.where(mirrored[:, None, None], images[:, :, ::-1], images)
    field = np.zeros((len(images), FIELD, FIELD), dtype=np.uint8)
    number = np.arange(len(images))[:, None, None]
    side = np.arange(SIDE)
    field[number, down[:, None, None] + side[:, None], right[:, None, None] + side] = images
    return field
