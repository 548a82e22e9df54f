"""Owns the readers of IMDb and CIFAR-10 as published: `datasets` (the hub, a folder of Parquet files, a save_to_disk
folder) and a prepared ArrayRecord folder of `tensorflow_datasets`, read without TensorFlow.

Every reader returns {"train": rows, "test": rows} with rows = (values, labels [N]): values are bytes (text) or uint8
arrays [32, 32, 3] (RGB).
"""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.base import DataError, Missing
from data.sources import hub_reachable, load_hub_dataset

READERS = ("datasets", "tfds")
Rows = tuple[list[Any], np.ndarray]


@dataclass(frozen=True)
class HubSet:
    """A data set as both libraries know it."""

    hub_name: str
    hub_config: str
    tfds_name: str
    hub_column: str
    tfds_column: str
    counts: Mapping[str, int]
    num_classes: int
    decode: Callable[[Any], Any]

    @property
    def short_name(self) -> str:
        return self.hub_name.partition("/")[2]


def _as_bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _as_rgb(value: Any) -> np.ndarray:
    """[32, 32, 3] uint8 of an encoded image ({"bytes": ...}) or a decoded one."""
    if isinstance(value, dict):
        value = np.asarray(Image.open(io.BytesIO(value["bytes"])).convert("RGB"))
    if value.shape != (32, 32, 3) or value.dtype != np.uint8:
        raise ValueError(f"an image of shape {value.shape} and type {value.dtype}, expected (32, 32, 3) uint8")
    return value


IMDB = HubSet(
    "stanfordnlp/imdb", "plain_text", "imdb_reviews", "text", "text", {"train": 25000, "test": 25000}, 2, _as_bytes
)
CIFAR10 = HubSet(
    "uoft-cs/cifar10", "plain_text", "cifar10", "img", "image", {"train": 50000, "test": 10000}, 10, _as_rgb
)


@dataclass(frozen=True)
class HubReader:
    """How this run reaches a hub set: `reader`, an optional local folder `path`, and the data folder, where a folder
    <datasets>/downloads/<name> of Parquet files is found without being named."""

    hub_set: HubSet
    reader: str
    path: Path | None
    datasets: Path

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            raise DataError(f"task.hub_reader={self.reader!r} is unknown; choose one of {', '.join(READERS)}")

    @property
    def local_place(self) -> Path:
        return self.datasets / "downloads" / self.hub_set.short_name

    def folder(self) -> Path | None:
        """The local folder to read, or None for the hub by name."""
        if self.reader == "tfds":
            home = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
            return (self.path or Path(home)).expanduser()
        if self.path is not None:
            return self.path.expanduser()
        return self.local_place if self.local_place.is_dir() else None

    def identity(self) -> dict[str, Any]:
        """What the bytes depend on: the hub's name, or names and sizes of the files in the local folder."""
        folder = self.folder()
        if folder is None:
            return {"reader": self.reader, "hub": self.hub_set.hub_name}
        root = folder / self.hub_set.tfds_name if self.reader == "tfds" else folder
        files = sorted((str(path.relative_to(root)), path.stat().st_size) for path in root.rglob("*") if path.is_file())
        return {"reader": self.reader, "files": files}

    def check(self) -> list[Missing]:
        """What reading would have to download, or would lack."""
        hub_set, folder = self.hub_set, self.folder()
        if self.reader == "tfds":
            assert folder is not None
            found = _tfds_versions(hub_set, folder)
            return [] if found else [Missing(hub_set.tfds_name, folder / hub_set.tfds_name, self._tfds_advice())]
        if folder is not None:
            return [] if folder.is_dir() else [Missing(hub_set.hub_name, folder, self._hub_advice())]
        home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
        cache = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
        if (cache / hub_set.hub_name.replace("/", "___") / hub_set.hub_config).is_dir():
            return []
        return [Missing(hub_set.hub_name, self.local_place, self._hub_advice(), fetchable=hub_reachable())]

    def read(self) -> dict[str, Rows]:
        """{"train", "test"}: values and labels, whole splits in published order. Raises DataError with advice."""
        where = self.folder() or self.hub_set.hub_name
        advice = self._tfds_advice() if self.reader == "tfds" else self._hub_advice()
        try:
            rows = self._read_tfds() if self.reader == "tfds" else self._read_datasets()
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError, ImportError) as error:
            raise DataError(
                f"{self.hub_set.short_name}: {where} could not be read ({type(error).__name__}: {error}); {advice}"
            ) from error
        for split, (values, labels) in rows.items():
            expected = self.hub_set.counts[split]
            if len(values) != expected:
                raise DataError(f"{where}: {split} has {len(values)} examples, expected {expected}; {advice}")
            if labels.min() < 0 or labels.max() >= self.hub_set.num_classes:
                raise DataError(f"{where}: {split} has labels {labels.min()}..{labels.max()}; {advice}")
        return rows

    def _hub_advice(self) -> str:
        return (
            "it is downloaded at preparation where the Hugging Face hub is reachable; elsewhere bring the files "
            f"train-*.parquet and test-*.parquet of https://huggingface.co/datasets/{self.hub_set.hub_name} (or what "
            f"save_to_disk wrote) into the folder {self.local_place}, or name another folder by task.hub_path"
        )

    def _tfds_advice(self) -> str:
        return (
            f"prepare it where TensorFlow is installed by tfds.load({self.hub_set.tfds_name!r}, "
            "builder_kwargs={'file_format': 'array_record'}) and name its data_dir by task.hub_path or TFDS_DATA_DIR"
        )

    def _read_datasets(self) -> dict[str, Rows]:
        import datasets

        folder = self.folder()
        column = self.hub_set.hub_column
        if folder is None:
            tables = _tables(load_hub_dataset(self.hub_set.hub_name, self.hub_set.hub_config))
        elif not folder.is_dir():
            raise DataError(f"{folder} is not a folder; {self._hub_advice()}")
        elif (folder / "dataset_dict.json").is_file():
            tables = _tables(datasets.load_from_disk(str(folder)))
        else:
            tables = {split: _parquet_table(folder, split) for split in self.hub_set.counts}
        return {
            split: self._decode(tables[split][column].to_pylist(), tables[split]["label"].to_pylist())
            for split in self.hub_set.counts
        }

    def _read_tfds(self) -> dict[str, Rows]:
        import tensorflow_datasets as tfds

        folder = self.folder()
        assert folder is not None
        if not _tfds_versions(self.hub_set, folder):
            raise DataError(f"{folder / self.hub_set.tfds_name} holds no prepared data; {self._tfds_advice()}")
        rows = {}
        for split in self.hub_set.counts:
            source = tfds.data_source(self.hub_set.tfds_name, split=split, data_dir=str(folder), download=False)
            items = [source[index] for index in range(len(source))]
            rows[split] = self._decode([item[self.hub_set.tfds_column] for item in items], [i["label"] for i in items])
        return rows

    def _decode(self, values: list[Any], labels: list[int]) -> Rows:
        return [self.hub_set.decode(value) for value in values], np.asarray(labels, dtype=np.int64)


def _tables(dataset: Mapping[str, Any]) -> dict[str, pa.Table]:
    """Arrow tables of a DatasetDict; images stay encoded, {"bytes", "path"}."""
    return {split: part.with_format("arrow")[:] for split, part in dataset.items()}


def _parquet_table(folder: Path, split: str) -> pa.Table:
    """All files train-00000-of-00001.parquet, train.parquet or train/*.parquet below the folder, in order of name."""
    files = sorted(path for path in folder.rglob("*.parquet") if _split_of(path) == split)
    if not files:
        raise FileNotFoundError(f"no {split}-*.parquet below {folder}")
    return pa.concat_tables([pq.ParquetFile(path).read() for path in files])


def _split_of(path: Path) -> str:
    stem = path.stem.partition("-")[0]
    return path.parent.name if stem.isdecimal() else stem


def _tfds_versions(hub_set: HubSet, folder: Path) -> list[Path]:
    """<folder>/<name>[/<config>]/<version>/dataset_info.json, the sign of a finished preparation."""
    root = folder / hub_set.tfds_name
    return [*root.glob("*/dataset_info.json"), *root.glob("*/*/dataset_info.json")]
