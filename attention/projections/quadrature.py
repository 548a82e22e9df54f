"""Owns the projections that are quadrature rules of N(0, I): quasi-Monte Carlo, matched moments, Gauss-Hermite."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attention.projections.base import Projection, ProjectionMatrix, RowNorm


@dataclass(frozen=True)
class Qmc(Projection):
    """Scrambled Sobol points u_i in (0, 1)^D through the inverse normal distribution function (1412.8293).

    Rows are points. Scrambling makes every single row N(0, I) (up to 2^-30); together they cover space evenly.
    """

    gaussian_marginals: ClassVar[bool] = True
    row_norm: ClassVar[RowNorm] = "chi"
    paper: ClassVar[str] = "1412.8293"

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
        sobol = torch.quasirandom.SobolEngine(head_dim, scramble=True, seed=seed)
        points = sobol.draw(num_features, dtype=torch.float64)
        return torch.special.ndtri(points.clamp(1e-7, 1 - 1e-7)).float()  # 0 would become -inf


@dataclass(frozen=True)
class MomentMatched(Projection):
    """Gaussian rows, recentred and whitened to mean 0 and W'W / F = I exactly (Shen et al. 2017).

    Lower variance for a bias of order 1/F. Needs F > D.
    """

    gaussian_marginals: ClassVar[bool] = False
    row_norm: ClassVar[RowNorm] = "other"
    no_factor: ClassVar[str | None] = "it needs more than D rows at a time, and high degrees have fewer features"

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        if num_features <= head_dim:
            raise ValueError(
                f"MomentMatched: {num_features} rows have no regular covariance in {head_dim} dimensions; "
                f"use num_features > {head_dim}"
            )
        rows = torch.randn(num_features, head_dim, generator=generator, dtype=torch.float64)
        rows = rows - rows.mean(dim=0)
        factor = torch.linalg.cholesky(rows.T @ rows / num_features)
        return torch.linalg.solve_triangular(factor, rows.T, upper=False).T.float().contiguous()


@dataclass(frozen=True)
class GaussHermiteSampled(Projection):
    """Every coordinate independent from the Gauss-Hermite rule with `num_nodes` nodes, drawn by weight (1709.02605).

    A random subsample of the dense grid: moments up to degree 2 num_nodes - 1 in each coordinate are those of N(0, 1),
    which leaves a bias that exponential features of ordinary norms do not notice.
    """

    num_nodes: int
    gaussian_marginals: ClassVar[bool] = False
    row_norm: ClassVar[RowNorm] = "other"
    paper: ClassVar[str] = "1709.02605"

    def __post_init__(self) -> None:
        if self.num_nodes < 2:
            raise ValueError(f"GaussHermiteSampled: num_nodes must be at least 2, got {self.num_nodes}")

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        nodes, weights = gauss_hermite(self.num_nodes)
        index = torch.multinomial(weights, num_features * head_dim, replacement=True, generator=generator)
        return nodes[index].view(num_features, head_dim).float()

    def moment_generating(self, u: Tensor) -> Tensor:
        nodes, weights = (part.to(u) for part in gauss_hermite(self.num_nodes))
        return ((u[..., None] * nodes).exp() @ weights).prod(dim=-1)

    def characteristic(self, u: Tensor) -> Tensor:
        nodes, weights = (part.to(u) for part in gauss_hermite(self.num_nodes))
        return ((u[..., None] * nodes).cos() @ weights).prod(dim=-1)


@dataclass(frozen=True)
class SparseGrid(Projection):
    """The level-1 Smolyak rule (1709.02605): nodes 0 and +-sqrt(3) e_c, weights 1 - D/3 and 1/6. Nothing is random.

    2 D + 1 rows. Exact up to degree 3 (mixed terms of degree 4 are wrong). The weight of 0 is negative for D > 3, so
    that estimates are signed.
    """

    gaussian_marginals: ClassVar[bool] = False
    row_norm: ClassVar[RowNorm] = "other"
    no_factor: ClassVar[str | None] = "its 2 D + 1 rows have weights of their own"
    paper: ClassVar[str] = "1709.02605"

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        if num_features != 2 * head_dim + 1:
            raise ValueError(
                f"SparseGrid has 2 D + 1 nodes: with head_dim {head_dim} use num_features={2 * head_dim + 1}, "
                f"not {num_features}"
            )
        axes = math.sqrt(3.0) * torch.eye(head_dim)
        return torch.cat([torch.zeros(1, head_dim), axes, -axes])

    def build(self, num_features: int, head_dim: int, generator: torch.Generator) -> ProjectionMatrix:
        weights = torch.full((num_features,), 1 / 6)
        weights[0] = 1 - head_dim / 3
        return ProjectionMatrix(self.sample(num_features, head_dim, generator), weights)

    def moment_generating(self, u: Tensor) -> Tensor:
        return 1 + ((math.sqrt(3.0) * u).cosh() - 1).sum(dim=-1) / 3

    def characteristic(self, u: Tensor) -> Tensor:
        return 1 + ((math.sqrt(3.0) * u).cos() - 1).sum(dim=-1) / 3


def gauss_hermite(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [num_nodes], float64, of the rule for N(0, 1), from the eigenvectors of its recurrence."""
    off_diagonal = torch.arange(1, num_nodes, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, vectors[0].square()
