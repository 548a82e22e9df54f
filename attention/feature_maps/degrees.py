"""Owns how the random features of a Maclaurin map are spread over the degrees of the series, and their weights."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from attention.kernels import Kernel


@dataclass(frozen=True)
class Degrees:
    """`counts[n]` features of degree n, each of squared weight `weights[n]`.

    `expected[n]` is the mean of counts[n] over draws; the map estimates sum_n expected[n] weights[n] t^n.
    """

    counts: Mapping[int, int]
    expected: Mapping[int, float]
    weights: Mapping[int, float]
    iid: bool  # True when every feature drew its own degree


class DegreeLaw(ABC):
    """Stateless. All draws come from the generator."""

    @abstractmethod
    def draw(
        self, kernel: Kernel, first_degree: int, num_random: int, head_dim: int, generator: torch.Generator
    ) -> Degrees:
        """Spread `num_random` >= 1 features over degrees >= first_degree."""


@dataclass(frozen=True)
class Geometric(DegreeLaw):
    """P(n) proportional to base^-n on first_degree..max_degree.

    The published law with first_degree = 1; on n >= 0 (first_degree = 0) half of the features would be constants.
    `sampling`: "iid" as published: the one draw of degrees is kept for life, so a given layer estimates a slightly
    reweighted series. "stratified": counts rounded to num_random P(n), weights matched to them.
    """

    base: float
    max_degree: int
    sampling: Literal["iid", "stratified"]

    def draw(
        self, kernel: Kernel, first_degree: int, num_random: int, head_dim: int, generator: torch.Generator
    ) -> Degrees:
        if self.base <= 1:
            raise ValueError(f"degree_law.base={self.base} must exceed 1: P(n) ~ base^-n has to decrease")
        law = {n: self.base**-n for n in _degrees(kernel, first_degree, self.max_degree)}
        return _sample(kernel, law, num_random, generator, self.sampling)


@dataclass(frozen=True)
class KernelLaw(DegreeLaw):
    """P(n) proportional to a_n on first_degree..max_degree: every feature has the same weight."""

    max_degree: int
    sampling: Literal["iid", "stratified"]

    def draw(
        self, kernel: Kernel, first_degree: int, num_random: int, head_dim: int, generator: torch.Generator
    ) -> Degrees:
        law = {n: kernel.coefficient(n) for n in _degrees(kernel, first_degree, self.max_degree)}
        return _sample(kernel, law, num_random, generator, self.sampling)


@dataclass(frozen=True)
class Optimal(DegreeLaw):
    """Counts that minimise the expected squared error of the kernel over isotropic unit-norm q, k at a temperature.

    Without shrinkage: D_n proportional to a_n sqrt(v_n), v_n = E Var of one feature. With shrinkage: the block of
    degree n is multiplied by lambda_n = b_n / (b_n + v_n / D_n), b_n = E t^2n, and the counts minimise the error
    that remains, sum_n a_n^2 b_n v_n / (b_n D_n + v_n). Biased towards 0, never worse than leaving a degree out.
    Degree 0 has no variance: where it is left to the law, one feature carries it.
    """

    max_degree: int
    temperature: float
    shrinkage: bool

    def draw(
        self, kernel: Kernel, first_degree: int, num_random: int, head_dim: int, generator: torch.Generator
    ) -> Degrees:
        constant = {0: 1} if first_degree == 0 else {}
        num_random -= len(constant)
        if num_random < 1:
            raise ValueError("Optimal needs a feature besides the constant: num_features must be at least 2")
        law = {}
        for n in _degrees(kernel, max(first_degree, 1), self.max_degree):
            scale = kernel.coefficient(n) * (self.temperature / head_dim**0.5) ** n
            law[n] = scale * (1 - isotropic_moment(n, head_dim)) ** 0.5
        counts = _best_shrunk(law, num_random, head_dim) if self.shrinkage else _apportion(law, num_random)
        return _stratified(kernel, constant | counts, head_dim, self.shrinkage)


@dataclass(frozen=True)
class Counts(DegreeLaw):
    """Counts given by hand, as {degree: number of features}; `shrinkage` as in Optimal."""

    counts: Mapping[int, int]
    shrinkage: bool

    def draw(
        self, kernel: Kernel, first_degree: int, num_random: int, head_dim: int, generator: torch.Generator
    ) -> Degrees:
        if sum(self.counts.values()) != num_random or min(self.counts) < first_degree:
            raise ValueError(
                f"degree_law.counts={dict(self.counts)} must spread exactly {num_random} features (num_features less "
                f"the exact part) over degrees >= {first_degree} (exact_degree + 1)"
            )
        return _stratified(kernel, dict(self.counts), head_dim, self.shrinkage)


def isotropic_moment(degree: int, head_dim: int) -> float:
    """E[(u.w)^2n] for independent uniform unit vectors u, w in R^D: (2n-1)!! / (D (D+2) ... (D+2n-2))."""
    moment = 1.0
    for j in range(degree):
        moment *= (2 * j + 1) / (head_dim + 2 * j)
    return moment


def _degrees(kernel: Kernel, first: int, last: int) -> range:
    if not any(kernel.coefficient(n) for n in range(first, last + 1)):
        raise ValueError(
            f"{type(kernel).__name__} has no term of degree {first} to {last} for random features to estimate; raise "
            "degree_law.max_degree, or lower num_features to the width of the exact part"
        )
    return range(first, last + 1)


def _sample(
    kernel: Kernel, law: Mapping[int, float], num_random: int, generator: torch.Generator, sampling: str
) -> Degrees:
    if sampling == "stratified":
        return _stratified(kernel, _apportion(law, num_random), 1, False)
    if sampling != "iid":
        raise ValueError(f"unknown degree_law.sampling={sampling!r}; choose iid or stratified")
    total = sum(law.values())
    probabilities = torch.tensor([p / total for p in law.values()], dtype=torch.float64)
    drawn = torch.multinomial(probabilities, num_random, replacement=True, generator=generator)
    counts = torch.bincount(drawn, minlength=len(law)).tolist()
    expected = {n: num_random * p / total for n, p in law.items() if p > 0}
    weights = {n: kernel.coefficient(n) / mean for n, mean in expected.items()}
    return Degrees({n: c for n, c in zip(law, counts, strict=True) if c}, expected, weights, iid=True)


def _stratified(kernel: Kernel, counts: Mapping[int, int], head_dim: int, shrinkage: bool) -> Degrees:
    counts = {n: c for n, c in counts.items() if c}
    weights = {}
    for n, count in counts.items():
        b = isotropic_moment(n, head_dim)
        kept = b / (b + (1 - b) / count) if shrinkage else 1.0
        weights[n] = kernel.coefficient(n) * kept / count
    return Degrees(counts, {n: float(c) for n, c in counts.items()}, weights, iid=False)


def _apportion(law: Mapping[int, float], total: int) -> dict[int, int]:
    """Integers proportional to `law` that add up to `total` (largest remainders)."""
    scale = total / sum(law.values())
    counts = {n: int(p * scale) for n, p in law.items()}
    by_remainder = sorted(law, key=lambda n: counts[n] - law[n] * scale)
    for n in by_remainder[: total - sum(counts.values())]:
        counts[n] += 1
    return counts


def _best_shrunk(law: Mapping[int, float], total: int, head_dim: int) -> dict[int, int]:
    """Give one feature after the other to the degree whose remaining error falls most; optimal, as each is convex."""

    def error(n: int, count: int) -> float:
        ratio = isotropic_moment(n, head_dim)
        return law[n] ** 2 * ratio / (ratio * count + 1 - ratio)  # a_n^2 b_n v_n / (b_n D_n + v_n), v_n = 1 - ratio

    counts = dict.fromkeys(law, 0)
    for _ in range(total):
        best = max(law, key=lambda n: error(n, counts[n]) - error(n, counts[n] + 1))
        counts[best] += 1
    return counts
