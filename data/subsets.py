"""Owns which rows go into which split: seeded hold-outs and class-balanced subsets of a labelled set."""

import hashlib

import numpy as np


def balanced_subset(labels: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Sorted row numbers [min(count, N)] of a seeded subset, its classes as equal in size as `labels` [N] permit.
    None: all rows."""
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)  # of a row among those of its class
    for label in np.unique(labels):
        rows = shuffled[labels[shuffled] == label]
        rank[rows] = np.arange(len(rows))
    return np.sort(np.lexsort((labels, rank))[:count])


def stratified_holdout(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted row numbers (kept [N - count], held out [count]); the held-out part is class-balanced."""
    held = balanced_subset(labels, count, seed)
    return np.setdiff1d(np.arange(len(labels)), held, assume_unique=True), held


def plain_holdout(num_rows: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted row numbers (kept [N - count], held out [count]) by one seeded permutation."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_rows)
    return np.sort(order[: num_rows - count]), np.sort(order[num_rows - count :])


def index_sha256(index: np.ndarray) -> str:
    """SHA-256 of sorted row numbers as little-endian int32: the name of a split."""
    return hashlib.sha256(np.sort(index).astype("<i4").tobytes()).hexdigest()
