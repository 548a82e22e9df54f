"""Owns the contract of a task: Batch, Manifest, Missing, Task, and the order in which examples are served.

Legend: B batch, S sequences per example (2 for Retrieval, else 1), L length.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.encoded import EncodedSplit
from data.resident import ResidentSplit

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class DataError(ValueError):
    """Data that is missing or malformed. The message names the file, the record, and what to do."""


@dataclass(frozen=True)
class Batch:
    """tokens [B, S, L] int64; key_padding_mask [B, S, L] bool, True at padding, or None when nothing is padded;
    labels [B] int64. The mask comes from true lengths, never from token values."""

    tokens: Tensor
    key_padding_mask: Tensor | None
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        mask = None if self.key_padding_mask is None else self.key_padding_mask.to(device, non_blocking=True)
        return Batch(self.tokens.to(device, non_blocking=True), mask, self.labels.to(device, non_blocking=True))


@dataclass(frozen=True)
class Manifest:
    """What was served: goes into every run record, so that a number can be traced to its bytes."""

    task: str
    dataset: str  # e.g. "listops", "text-imdb20k": the name that tables show when it is a stand-in
    source: str  # official | hub | generated | embedded | wheel | debian
    stand_in: bool  # True when the data is not the benchmark's own
    counts: Mapping[str, int]  # examples per split
    sha256: Mapping[str, str]  # per split, over encoded tokens, offsets and labels
    details: Mapping[str, Any] = field(default_factory=dict)  # source checksums, parameters, notes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Missing:
    """One thing that a source needs and that is not there."""

    what: str  # "basic_train.tsv"
    expected_at: Path
    how_to_get: str  # one sentence that a stranger can follow
    fetchable: bool = False  # `prepare` fetches it by itself


class Task(ABC):
    """One of the benchmark's tasks from one source. Subclasses define `check` and `prepare`."""

    name: str
    num_classes: int
    num_sequences: int = 1

    def __init__(self, *, source: str, vocab_size: int, max_len: int, datasets: str) -> None:
        """`vocab_size`: rows of the embedding table; `max_len`: longest sequence served; `datasets`: the data folder."""
        self.source, self.vocab_size, self.max_len = source, vocab_size, max_len
        self.datasets = Path(datasets).expanduser()
        self._splits: dict[str, EncodedSplit] = {}
        self._manifest: Manifest | None = None
        self._home: torch.device | None = None
        self._resident: dict[str, ResidentSplit] = {}

    @abstractmethod
    def check(self) -> list[Missing]:
        """What `prepare` would miss, without reading or fetching anything large (well under a second)."""

    @abstractmethod
    def _prepare(self) -> tuple[Manifest, dict[str, EncodedSplit]]:
        """Find or make the encoded splits. Raises DataError."""

    def entries(self) -> list[Path]:
        """Cache folders that `prepare` would serve, the first that is there, found without preparing anything. Empty
        while the files that name them are missing."""
        return []

    def describe(self, sequence: np.ndarray) -> dict[str, Any]:
        """What true token ids [L] stand for, for a person to read: "text", and what the task can say about it. Empty
        for images."""
        return {}

    @property
    def image_side(self) -> int | None:
        """Side of the square image that a sequence is, row by row; None for other sequences."""
        return None

    def prepare(self) -> Manifest:
        """Idempotent; afterwards `split` and `batches` work. Raises DataError with file, record and advice."""
        if self._manifest is None:
            self._manifest, self._splits = self._prepare()
        return self._manifest

    def split(self, split: Split) -> EncodedSplit:
        self.prepare()
        return self._splits[split]

    def hold_on(self, device: torch.device) -> None:
        """From now on each split that is asked for is copied to `device` whole, and batches are gathered there. The
        batches stay the same to the last bit."""
        self._home = device

    def batches(
        self,
        split: Split,
        batch_size: int,
        seed: int | None = None,
        start: int = 0,
        pad_to_max_len: bool = False,
        length_bucketing: bool = False,
    ) -> Iterator[Batch]:
        """With seed None: one pass in order, every example once, the last batch as small as it is.
        With a seed: the endless shuffled stream, from step `start` on. Batch number i of the stream depends on
        (seed, i) alone: that is what makes a resumed run equal to an uninterrupted one. `length_bucketing` groups
        examples of similar length in this stream, for less padding."""
        data = self.split(split)
        pad_to = self.max_len if pad_to_max_len else None
        if seed is None:
            for first in range(start * batch_size, len(data), batch_size):
                yield self._batch(split, np.arange(first, min(first + batch_size, len(data))), pad_to)
            return
        longest = data.lengths().max(axis=1) if length_bucketing else None
        for step in itertools.count(start):
            if longest is None:
                index = stream_indices(len(data), batch_size, seed, step)
            else:
                index = bucketed_indices(longest, batch_size, seed, step)
            yield self._batch(split, index, pad_to)

    def _batch(self, split: Split, index: np.ndarray, pad_to: int | None) -> Batch:
        if self._home is not None:
            if split not in self._resident:
                self._resident[split] = ResidentSplit(self.split(split), self._home)
            return Batch(*self._resident[split].gather(index, pad_to))
        tokens, mask, labels = self.split(split).gather(index, pad_to)
        mask_tensor = None if mask is None else torch.from_numpy(mask)
        return Batch(torch.from_numpy(tokens), mask_tensor, torch.from_numpy(labels))


def stream_indices(num_examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of batch `step` of the stream: permutations of the split, one after another, cut into batches."""
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // num_examples, (last - 1) // num_examples + 1):
        order = _permutation(num_examples, seed, epoch)
        offset = epoch * num_examples
        parts.append(order[max(first - offset, 0) : last - offset])
    return np.concatenate(parts)


def bucketed_indices(longest: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of batch `step` when lengths are bucketed. The stream of `stream_indices` is cut into pools of
    _POOL_BATCHES batches (fewer when an epoch has fewer); a pool is sorted by length, cut into batches, and these are
    shuffled. `longest` [N]: the longest sequence of each example. Only a pool's own epochs mix, as in the plain stream."""
    pool_batches = max(1, min(_POOL_BATCHES, len(longest) // batch_size))
    pool, place = divmod(step, pool_batches)
    size = pool_batches * batch_size
    index = stream_indices(len(longest), size, seed, pool)
    epoch = np.arange(pool * size, (pool + 1) * size) // len(longest)
    ordered = index[np.lexsort((longest[index], epoch))].reshape(pool_batches, batch_size)
    turn = np.random.Generator(np.random.PCG64([seed, pool, _POOL_BATCHES])).permutation(pool_batches)
    return ordered[turn[place]]


_POOL_BATCHES = 50


_last_permutation: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    key = (num_examples, seed, epoch)
    if key not in _last_permutation:
        if len(_last_permutation) > 4:
            _last_permutation.clear()
        _last_permutation[key] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_examples)
    return _last_permutation[key]
