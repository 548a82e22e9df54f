"""Owns the encoded form of a split: memory-mapped token ids, offsets and labels, written once and atomically."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

PARTS = ("tokens", "offsets", "labels")
MANIFEST = "manifest.json"  # written last: an entry without it is not finished
CHUNK = 1 << 20  # bytes read or buffered at once


@dataclass(frozen=True)
class EncodedSplit:
    """N examples of S sequences. Sequence s of example i is tokens[offsets[i*S+s] : offsets[i*S+s+1]]."""

    tokens: np.ndarray  # uint8 or uint16, all sequences end to end
    offsets: np.ndarray  # int64 [N*S + 1]
    labels: np.ndarray  # uint8 [N]
    num_sequences: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> np.ndarray:
        """[N, S] true lengths."""
        return np.diff(self.offsets).reshape(-1, self.num_sequences)

    def gather(self, index: np.ndarray, pad_to: int | None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Examples `index` [B] -> tokens [B, S, L] int64 (0 at padding), mask [B, S, L] or None, labels [B] int64.
        L is `pad_to`, or the longest sequence among these examples."""
        rows = index[:, None] * self.num_sequences + np.arange(self.num_sequences)  # [B, S]
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        length = int(lengths.max()) if pad_to is None else pad_to
        positions = np.arange(length)
        padding = positions >= lengths[..., None]  # [B, S, L]
        place = starts[..., None] + np.minimum(positions, np.maximum(lengths - 1, 0)[..., None])
        tokens = self.tokens[np.minimum(place, len(self.tokens) - 1)].astype(np.int64)
        labels = self.labels[index].astype(np.int64)
        if not padding.any():
            return tokens, None, labels
        tokens[padding] = 0
        return tokens, padding, labels

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for array in (getattr(self, part) for part in PARTS):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(memoryview(np.ascontiguousarray(array)).cast("B"))
        return digest.hexdigest()


def encode(sequences: Iterable[np.ndarray], labels: Iterable[int], num_sequences: int = 1) -> EncodedSplit:
    """Lay sequences (N*S of them, already token ids) end to end."""
    parts = list(sequences)
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    largest = max((int(part.max()) for part in parts if len(part)), default=0)
    dtype = np.uint8 if largest < 256 else np.uint16
    tokens = np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
    return EncodedSplit(tokens, offsets, np.asarray(list(labels), dtype=np.uint8), num_sequences)


def key_of(parameters: Mapping[str, Any]) -> str:
    """Name of a cache entry: the hash of everything that its bytes depend on."""
    return hashlib.sha256(json.dumps(parameters, sort_keys=True, default=str).encode()).hexdigest()[:16]


def part_file(folder: Path, split: str, part: str) -> Path:
    """Where one of PARTS of a split lies in a cache entry."""
    return folder / f"{split}.{part}.npy"


def read_manifest(folder: Path) -> tuple[dict[str, Any], int] | None:
    """The manifest and the number of sequences per example of a finished cache entry, or None when there is none."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    return content["manifest"], content["num_sequences"]


def load_cache(folder: Path) -> tuple[dict[str, Any], dict[str, EncodedSplit]] | None:
    """The manifest and the memory-mapped splits of a finished cache entry, or None when there is none."""
    found = read_manifest(folder)
    if found is None:
        return None
    manifest, num_sequences = found
    splits = {}
    for split in manifest["counts"]:
        arrays = (np.load(part_file(folder, split, part), mmap_mode="r", allow_pickle=False) for part in PARTS)
        splits[split] = EncodedSplit(*arrays, num_sequences=num_sequences)
    return manifest, splits


def save_cache(folder: Path, manifest: Mapping[str, Any], splits: Mapping[str, EncodedSplit]) -> None:
    """Write a cache entry under a temporary name, flush it to disk, and rename it into place. A kill, a full disk or a
    second process that prepares the same entry at once never leave half an entry that a later run would trust."""
    temporary = new_entry(folder)
    try:
        num_sequences = 1
        for name, split in splits.items():
            num_sequences = split.num_sequences
            for part in PARTS:
                write_array(part_file(temporary, name, part), getattr(split, part))
        publish(temporary, folder, manifest, num_sequences)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def new_entry(folder: Path) -> Path:
    """An empty folder beside `folder`, for an entry in the making."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))


def publish(temporary: Path, folder: Path, manifest: Mapping[str, Any], num_sequences: int) -> None:
    """Complete an entry by its manifest and give it its name. When another process was faster, its equal entry stays."""
    with open(temporary / MANIFEST, "w") as file:
        file.write(json.dumps({"num_sequences": num_sequences, "manifest": manifest}, indent=1, default=str))
        flush(file)
    os.chmod(temporary, 0o755)  # mkdtemp's 0700 would hide a shared data folder from colleagues
    try:
        os.rename(temporary, folder)
    except OSError:
        if load_cache(folder) is None:  # not a race that another process won
            raise


def flush(file: IO[Any]) -> None:
    """Down to the disk: a power cut after a rename must not leave empty files under the new name."""
    file.flush()
    os.fsync(file.fileno())


def split_sha256(folder: Path, split: str) -> str:
    """EncodedSplit.sha256 of a split on disk, read piece by piece instead of mapped into memory as a whole."""
    digest = hashlib.sha256()
    for part in PARTS:
        with open(part_file(folder, split, part), "rb") as file:
            shape, dtype = read_header(file)
            digest.update(f"{dtype.str}{shape}".encode())
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def write_array(path: Path, array: np.ndarray) -> None:
    """A .npy file of a vector, down to the disk. np.save would hide why a write failed (no space, a quota)."""
    with open(path, "wb") as file:
        write_header(file, array.dtype, len(array))
        file.write(np.ascontiguousarray(array))
        flush(file)


def write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """A .npy header at the start; NumPy pads it, so that it has the same size for every length."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    )


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of a .npy file; leaves `file` at the first byte of the array."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype
