"""Owns what ListOps expressions are drawn from and kept in: Grammar, Pool, and the versions of the code that fills one.

Free of numba, so that a process which finds its data in the cache never compiles anything.
"""

from dataclasses import dataclass

import numpy as np

from data.base import DataError

# Part of every cache key: raise one when the bytes for the same seed, or for the same file, change.
GENERATOR_VERSION = 1
READER_VERSION = 1
MIN_ARGS = 2

_MOST_DRAWS_PER_BLOCK = 8192
_MOST_BYTES_PER_BLOCK = 1 << 25


@dataclass(frozen=True)
class Grammar:
    """The law of one expression. A node above `max_depth` is an operator with `operator_probability`, else a digit; an
    operator has 2..max_args arguments. Kept when min_length < length < max_length, counted in tokens with X."""

    max_depth: int
    max_args: int
    operator_probability: float
    min_length: int
    max_length: int

    def __post_init__(self) -> None:
        if not (self.max_depth >= 1 and self.max_args >= MIN_ARGS and 0 <= self.operator_probability <= 1):
            raise DataError(f"{self}: needs max_depth >= 1, max_args >= {MIN_ARGS}, operator_probability in [0, 1]")
        if not 0 <= self.min_length < self.max_length - 1:
            raise DataError(
                f"no length is strictly between task.min_length={self.min_length} and task.max_length={self.max_length}"
            )

    @property
    def room(self) -> int:
        """Tokens that an unfinished tree may take: it is given up at a node, after the brackets which that closes."""
        return self.max_length + self.max_depth

    @property
    def draws_per_block(self) -> int:
        return max(1, min(_MOST_DRAWS_PER_BLOCK, _MOST_BYTES_PER_BLOCK // self.room))


@dataclass(frozen=True)
class Pool:
    """Expressions end to end, in ids with X: number i is tokens[offsets[i] : offsets[i + 1]], its value labels[i]."""

    tokens: np.ndarray  # uint8
    offsets: np.ndarray  # int64 [N + 1]
    labels: np.ndarray  # uint8 [N]
    draws: int = 0  # trees that were begun
    accepted: int = 0  # trees of a fitting length, duplicates included
    duplicates: int = 0


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """int64 [N + 1]: where each of N sequences that lie end to end begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
