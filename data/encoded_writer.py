"""Owns the writing of encoded splits that are larger than memory: sequences go to disk as they come, in the layout of
data.encoded, and the finished entry appears under its name at once or not at all."""

import os
import shutil
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from data.base import DataError, Manifest
from data.encoded import (
    CHUNK,
    flush,
    new_entry,
    part_file,
    publish,
    read_header,
    split_sha256,
    write_array,
    write_header,
)
from data.entries import Prepared, load_sound


class SplitWriter:
    """One split in the making. Ids are stored as uint8 until one of them needs uint16, as data.encoded.encode does."""

    def __init__(self, folder: Path, split: str, num_sequences: int) -> None:
        self._folder, self._split, self._num_sequences = folder, split, num_sequences
        self._dtype = np.dtype(np.uint8)
        self._offsets, self._labels = array("q", [0]), array("B")
        self._file: BinaryIO = open(self._path("tokens"), "wb+", buffering=CHUNK)  # noqa: SIM115
        write_header(self._file, self._dtype, 0)

    def append(self, sequences: Sequence[np.ndarray], label: int) -> None:
        """Add one example: its S sequences of ids in 0..65535, and its label in 0..255."""
        if len(sequences) != self._num_sequences:
            raise ValueError(f"{self._split}: an example has {self._num_sequences} sequences, got {len(sequences)}")
        for ids in sequences:
            if self._dtype == np.uint8 and len(ids) and int(ids.max()) > 255:
                self._widen()
            self._file.write(np.ascontiguousarray(ids, dtype=self._dtype))
            self._offsets.append(self._offsets[-1] + len(ids))
        self._labels.append(label)

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray:
        return np.array(self._labels, dtype=np.uint8)

    def finish(self) -> str:
        """Complete the three files, flush them to disk, and return the digest that EncodedSplit.sha256 would give."""
        write_header(self._file, self._dtype, self._offsets[-1])
        flush(self._file)
        self._file.close()
        for part, values in (("offsets", np.frombuffer(self._offsets, np.int64)), ("labels", self.labels())):
            write_array(self._path(part), values)
        return split_sha256(self._folder, self._split)

    def close(self) -> None:
        self._file.close()

    def _path(self, part: str) -> Path:
        return part_file(self._folder, self._split, part)

    def _widen(self) -> None:
        """Rewrite what is on disk as uint16, piece by piece."""
        self._dtype = np.dtype(np.uint16)
        wide_path = self._folder / f"{self._split}.wide"
        wide = open(wide_path, "wb+", buffering=CHUNK)  # noqa: SIM115
        write_header(wide, self._dtype, 0)
        self._file.seek(0)
        read_header(self._file)
        while chunk := self._file.read(CHUNK):
            wide.write(np.frombuffer(chunk, np.uint8).astype(self._dtype))
        self._file.close()
        os.replace(wide_path, self._path("tokens"))
        self._file = wide


class CacheWriter:
    """A cache entry in the making, to be used in a `with` block:

        with CacheWriter(folder, ("train", "test"), num_sequences=2) as cache:
            for example in examples: cache[example.split].append(example.sequences, example.label)
            counts, sha256 = cache.finish_splits()
            cache.publish(manifest)

    Leaving the block without `publish` leaves nothing behind."""

    def __init__(self, folder: Path, splits: Sequence[str], num_sequences: int) -> None:
        self._folder, self._num_sequences = folder, num_sequences
        self._temporary = new_entry(folder)
        self._writers = {split: SplitWriter(self._temporary, split, num_sequences) for split in splits}

    def __enter__(self) -> "CacheWriter":
        return self

    def __getitem__(self, split: str) -> SplitWriter:
        return self._writers[split]

    def finish_splits(self) -> tuple[dict[str, int], dict[str, str]]:
        """Examples and digest of each split, for the manifest. Nothing can be appended afterwards."""
        sha256 = {split: writer.finish() for split, writer in self._writers.items()}
        return {split: len(writer) for split, writer in self._writers.items()}, sha256

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Give the entry its name. When another process was faster, its equal entry stays."""
        publish(self._temporary, self._folder, manifest, self._num_sequences)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            with suppress(OSError):  # a full disk takes no last buffer; what was asked for is gone anyway
                writer.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


def serve_streamed(
    folder: Path, splits: Sequence[str], num_sequences: int, write: Callable[[CacheWriter], Manifest]
) -> Prepared:
    """The sound cache entry `folder`, or what `write` puts into a new one. Raises DataError."""
    if found := load_sound(folder):
        return found
    try:
        with CacheWriter(folder, splits, num_sequences) as cache:
            cache.publish(write(cache).as_dict())
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error}); free some room, or give LRA_DATASETS (paths.datasets) a writable folder"
        ) from error
    if found := load_sound(folder):
        return found
    raise DataError(f"{folder} does not hold what was just written to it; check the disk")
