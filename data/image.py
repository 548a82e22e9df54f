"""Owns the Image task: CIFAR-10 as a sequence of grey pixels (arXiv:2011.04006), and its stand-ins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import fashion
from data.base import SPLITS, DataError, Manifest, Missing, Split
from data.encoded import EncodedSplit, key_of
from data.entries import Prepared, serve
from data.fashion import FashionSplit
from data.hub import CIFAR10, HubReader
from data.pixels import PixelTask
from data.subsets import balanced_subset, index_sha256, plain_holdout

SOURCES = ("hub", "debian", "embedded")
AUGMENTS = ("shift_flip", "none")
SIZES = (32, 16, 8)
NUM_IDS = 256
ENCODING = 1  # part of the cache key; raise it when the bytes of an entry change


def tf_grayscale(rgb: np.ndarray) -> np.ndarray:
    """uint8 [...] of uint8 [..., 3]: floor(255.5 (0.2989 R + 0.5870 G + 0.1140 B) / 255), TensorFlow's formula, that of
    the benchmark. In integers, so that no machine's rounding matters."""
    red, green, blue = np.moveaxis(rgb.astype(np.int64), -1, 0)
    return (511 * (2989 * red + 5870 * green + 1140 * blue) // 5_100_000).astype(np.uint8)


def pil_grayscale(rgb: np.ndarray) -> np.ndarray:
    """uint8 [...] of uint8 [..., 3]: (19595 R + 38470 G + 7471 B + 2^15) >> 16, Pillow's and torchvision's formula."""
    red, green, blue = np.moveaxis(rgb.astype(np.int64), -1, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


GRAYSCALES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"tf": tf_grayscale, "pil": pil_grayscale}


@dataclass(frozen=True)
class _Pictures:
    """What a source gives: grey images [N, 32, 32] uint8 and labels [N] per split, and what records say about it."""

    dataset: str
    stand_in: bool
    splits: dict[Split, tuple[np.ndarray, np.ndarray]]
    details: dict[str, Any]


class Image(PixelTask):
    """Ten classes. Ids are grey values 0..255, row by row; every image has size^2 of them and nothing is padded.

    Sources: "hub", CIFAR-10, the benchmark's own; "debian", image-fashion32, and "embedded", image-fashion32-quick:
    Fashion-MNIST and a committed part of it, both stand-ins.
    """

    name = "image"
    num_classes = 10

    def __init__(
        self,
        *,
        source: str,
        datasets: str,
        vocab_size: int,
        size: int,
        pixel_zero_is_pad: bool,
        hub_reader: str,
        hub_path: str | None,
        grayscale: str,
        augment: str,
        num_validation: int,
        split_seed: int,
        num_train: int | None,
        num_val: int | None,
        num_test: int | None,
    ) -> None:
        """`size`: side of the served image, below 32 by averaging blocks. `grayscale`: how CIFAR-10's colours become
        grey, "tf" or "pil". `augment`: how a Fashion-MNIST image takes its place in the field, "shift_flip" or "none"
        (centred). `num_validation`: how many of CIFAR-10's 50,000 training images a permutation seeded with
        `split_seed` holds out. `num_train`, `num_val`, `num_test`: at most so many, class-balanced; None: all."""
        choices = {
            "source": (source, SOURCES),
            "size": (size, SIZES),
            "grayscale": (grayscale, tuple(GRAYSCALES)),
            "augment": (augment, AUGMENTS),
        }
        for key, (value, known) in choices.items():
            if value not in known:
                raise DataError(
                    f"task.{key}={value!r} is unknown for image; choose one of {', '.join(map(str, known))}"
                )
        if vocab_size < NUM_IDS:
            raise DataError(f"task.vocab_size={vocab_size}: image uses {NUM_IDS} ids")
        self.limits: dict[Split, int | None] = {"train": num_train, "val": num_val, "test": num_test}
        for key, value in {"num_validation": num_validation, **self.limits}.items():
            if value is not None and value < 1:
                raise DataError(f"image: {key}={value} must be at least 1")
        super().__init__(
            source=source,
            vocab_size=vocab_size,
            max_len=size * size,
            datasets=datasets,
            pixel_zero_is_pad=pixel_zero_is_pad,
        )
        self.size, self.grayscale, self.augment = size, grayscale, augment
        self.num_validation, self.split_seed = num_validation, split_seed
        self.hub = HubReader(CIFAR10, hub_reader, None if hub_path is None else Path(hub_path), self.datasets)

    @property
    def _downloads(self) -> Path:
        return self.datasets / "downloads"

    def check(self) -> list[Missing]:
        if self._entry().is_dir():
            return []
        if self.source == "hub":
            return self.hub.check()
        if self.source == "embedded":
            how = "it is part of the repository: check it out again"
            return [] if fashion.EMBEDDED.is_file() else [Missing(fashion.EMBEDDED.name, fashion.EMBEDDED, how)]
        if fashion.find_folder(self._downloads) or list(self._downloads.glob(f"{fashion.PACKAGE}_*.deb")):
            return []
        how = (
            f"the Debian package {fashion.PACKAGE} is fetched at preparation where apt-get is; elsewhere bring its four "
            "files *-ubyte.gz"
        )
        return [Missing(fashion.PACKAGE, self._downloads / "fashion-mnist", how, fetchable=True)]

    def entries(self) -> list[Path]:
        return [self._entry()]

    def _prepare(self) -> Prepared:
        read = {"hub": self._read_hub, "debian": self._read_debian, "embedded": self._read_embedded}[self.source]
        return serve(self._entry(), lambda: self._encode(read()))

    def _entry(self) -> Path:
        """The cache folder, named by all that its bytes depend on."""
        parameters: dict[str, Any] = {
            "encoding": ENCODING,
            "source": self.source,
            "size": self.size,
            "split_seed": self.split_seed,
            "limits": self.limits,
        }
        if self.source == "hub":
            parameters |= {"hub": self.hub.identity(), "grayscale": self.grayscale, "held_out": self.num_validation}
        else:
            identity = fashion.EMBEDDED_SHA256 if self.source == "embedded" else list(fashion.FILES.values())
            parameters |= {"fashion": identity, "augment": self.augment}
        return self.datasets / "encoded" / f"image-{key_of(parameters)}"

    def _read_hub(self) -> _Pictures:
        rows = self.hub.read()
        grey = {split: GRAYSCALES[self.grayscale](np.stack(values)) for split, (values, _) in rows.items()}
        labels = rows["train"][1]
        if self.num_validation >= len(labels):
            raise DataError(f"task.num_validation={self.num_validation}: train has {len(labels)} images")
        kept, held = plain_holdout(len(labels), self.num_validation, self.split_seed)
        splits: dict[Split, tuple[np.ndarray, np.ndarray]] = {
            "train": (grey["train"][kept], labels[kept]),
            "val": (grey["train"][held], labels[held]),
            "test": (grey["test"], rows["test"][1]),
        }
        details = {
            "hub": self.hub.identity(),
            "grayscale": self.grayscale,
            "validation_rows_sha256": index_sha256(held),
        }
        shrunk = self.size < 32  # no longer the benchmark's own pixels
        return _Pictures(f"image-{self.size}" if shrunk else "image", shrunk, splits, details)

    def _read_debian(self) -> _Pictures:
        splits = fashion.read_folder(fashion.fetch_folder(self._downloads))
        return self._place(splits, "", {"files_sha256": fashion.FILES})

    def _read_embedded(self) -> _Pictures:
        return self._place(fashion.read_embedded(), "-quick", {"file_sha256": fashion.EMBEDDED_SHA256})

    def _place(self, splits: dict[str, FashionSplit], suffix: str, details: dict[str, Any]) -> _Pictures:
        placed: dict[Split, tuple[np.ndarray, np.ndarray]] = {}
        for split in SPLITS:
            file = "test" if split == "test" else "train"
            images = fashion.place(splits[split], file, shift_flip=self.augment == "shift_flip")
            placed[split] = images, splits[split].labels
        plain = "" if self.augment == "shift_flip" else "-plain"
        details |= {"augment": self.augment, "validation_rows_sha256": index_sha256(splits["val"].rows)}
        return _Pictures(f"image-fashion{self.size}{plain}{suffix}", True, placed, details)

    def _encode(self, pictures: _Pictures) -> Prepared:
        splits: dict[str, EncodedSplit] = {}
        for split in SPLITS:
            images, labels = pictures.splits[split]
            rows = balanced_subset(labels, self.limits[split], self.split_seed)
            tokens = shrink(images[rows], self.size).reshape(-1)
            offsets = np.arange(len(rows) + 1, dtype=np.int64) * self.max_len
            splits[split] = EncodedSplit(tokens, offsets, labels[rows].astype(np.uint8))
        cut = any(len(splits[split]) < len(pictures.splits[split][1]) for split in ("train", "test"))
        manifest = Manifest(
            task=self.name,
            dataset=f"{pictures.dataset}-subset" if cut else pictures.dataset,
            source=self.source,
            stand_in=pictures.stand_in or cut,
            counts={name: len(split) for name, split in splits.items()},
            sha256={name: split.sha256() for name, split in splits.items()},
            details=pictures.details | {"size": self.size},
        )
        return manifest, splits


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, size, size] of uint8 [N, 32, 32]: the mean over square blocks, halves rounded up."""
    count, side, _ = images.shape
    block = side // size
    sums = images.reshape(count, size, block, size, block).sum(axis=(2, 4), dtype=np.int64)
    return ((2 * sums + block**2) // (2 * block**2)).astype(np.uint8)
