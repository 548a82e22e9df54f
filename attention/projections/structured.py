"""Owns the structured projections: products of Hadamard, sign, permutation and circulant matrices.

Every law builds square blocks of the transform's size and stacks them; the last one is truncated. The Hadamard
transform needs a power of two: for another D, its first D columns are used, as if x were padded with zeros. That keeps
E[w w'] = I, and for Fastfood also w ~ N(0, I); rows of one norm then get norms that vary a little.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attention.projections.base import Projection, ProjectionMatrix, RowNorm
from attention.projections.gaussian import chi
from attention.projections.moments import characteristic_on_sphere, moment_on_sphere


class _NearlySpherical(Projection):
    """Laws whose rows are so close to uniform on a sphere that its closed forms serve them.

    Measured at |u| = 1.2 and D from 8 to 32: E exp(w.u) differs by less than 1 %.
    """

    gaussian_marginals: ClassVar[bool] = False

    def moment_generating(self, u: Tensor) -> Tensor:
        return moment_on_sphere(u, padded_size(u.shape[-1]))

    def characteristic(self, u: Tensor) -> Tensor:
        return characteristic_on_sphere(u, padded_size(u.shape[-1]))


@dataclass(frozen=True)
class Sorf(_NearlySpherical):
    """sqrt(D) H L1 H L2 H L3, H the orthonormal Hadamard matrix, L diagonal random signs (1610.09072).

    W W' = D I exactly within a block. All rows have norm sqrt(D), which biases exponential features a little;
    `chi_norms` gives each row an independent chi(D) norm instead: nearly N(0, I), and never exactly.
    """

    chi_norms: bool
    paper: ClassVar[str] = "1610.09072"

    @property
    def row_norm(self) -> RowNorm:  # type: ignore[override]
        return "chi" if self.chi_norms else "fixed"

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        size = padded_size(head_dim)
        rows = _sign_products(3, size, num_features, generator)
        scale = chi(num_features, size, generator) if self.chi_norms else math.sqrt(size)
        return (rows * scale)[:, :head_dim].contiguous()

    def moment_generating(self, u: Tensor) -> Tensor:
        return (u.square().sum(dim=-1) / 2).exp() if self.chi_norms else super().moment_generating(u)

    def characteristic(self, u: Tensor) -> Tensor:
        return (-u.square().sum(dim=-1) / 2).exp() if self.chi_norms else super().characteristic(u)


@dataclass(frozen=True)
class RandomOrthogonalMatrix(_NearlySpherical):
    """sqrt(D) prod_{i <= k} (H L_i), H the orthonormal Hadamard matrix, L_i diagonal random signs (ROM, 1703.00864).

    `num_blocks` = k; k = 3 is the law of `Sorf`. Rows have norm sqrt(D).
    """

    num_blocks: int
    row_norm: ClassVar[RowNorm] = "fixed"
    paper: ClassVar[str] = "1703.00864"

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(f"{type(self).__name__}: num_blocks must be at least 1, got {self.num_blocks}")

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        size = padded_size(head_dim)
        rows = _sign_products(self.num_blocks, size, num_features, generator)
        return (rows * math.sqrt(size))[:, :head_dim].contiguous()

    def moment_generating(self, u: Tensor) -> Tensor:
        if self.num_blocks == 1:  # independent signs
            return u.cosh().prod(dim=-1)
        self._check_mixed()
        return super().moment_generating(u)

    def characteristic(self, u: Tensor) -> Tensor:
        if self.num_blocks == 1:
            return u.cos().prod(dim=-1)
        self._check_mixed()
        return super().characteristic(u)

    def _check_mixed(self) -> None:
        if self.num_blocks == 2:
            raise NotImplementedError("two blocks are not spherical: along an axis E exp(w.u) is 2 % off")


@dataclass(frozen=True)
class HybridRandomOrthogonalMatrix(Projection):
    """sqrt(2) times the real part of a ROM whose last block has entries exp(i theta), theta ~ U[0, 2 pi) (1703.00864).

    Norms vary between rows and blocks, and no closed form of E exp(w.u) is known for them.
    """

    num_blocks: int
    gaussian_marginals: ClassVar[bool] = False
    row_norm: ClassVar[RowNorm] = "other"
    paper: ClassVar[str] = "1703.00864"

    def __post_init__(self) -> None:
        if self.num_blocks < 2:
            raise ValueError(f"{type(self).__name__}: num_blocks must be at least 2, got {self.num_blocks}")

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        size = padded_size(head_dim)
        num_stacked = math.ceil(num_features / size)
        rows = _sign_products(self.num_blocks - 1, size, num_stacked * size, generator)
        rows = rows.unflatten(0, (num_stacked, size)) @ hadamard(size) / math.sqrt(size)
        theta = 2 * math.pi * torch.rand(num_stacked, 1, size, generator=generator)
        rows = (rows * theta.cos()).flatten(0, 1)[:num_features]
        return (math.sqrt(2 * size) * rows)[:, :head_dim].contiguous()


@dataclass(frozen=True)
class SignedCirculant(Projection):
    """circ(g) diag(signs), g ~ N(0, I) (Feng et al. 2015): every row is N(0, I); rows of a block share the norm |g|."""

    gaussian_marginals: ClassVar[bool] = True
    row_norm: ClassVar[RowNorm] = "chi"

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        num_blocks = math.ceil(num_features / head_dim)
        first = torch.randn(num_blocks, head_dim, generator=generator)
        position = torch.arange(head_dim)
        rows = first[:, (position[None, :] - position[:, None]) % head_dim]  # [num_blocks, D, D]
        return (rows * _signs((num_blocks, 1, head_dim), generator)).flatten(0, 1)[:num_features].contiguous()


@dataclass(frozen=True)
class Fastfood(Projection):
    """D^{-1/2} S H G P H B, H the +-1 Hadamard matrix, B signs, P a permutation, G ~ N(0, 1) diagonal (1408.3060).

    S_i = c_i / |G|, c_i ~ chi(D) independent: row i has norm c_i exactly, and every row is N(0, I).
    """

    gaussian_marginals: ClassVar[bool] = True
    row_norm: ClassVar[RowNorm] = "chi"
    paper: ClassVar[str] = "1408.3060"

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        return FastfoodMatrix(num_features, head_dim, generator)().detach()


@dataclass(frozen=True)
class FastfoodLearnable(Projection):
    """Fastfood with B, G and S as parameters, started at a draw of `Fastfood` (2110.08323).

    The rows are N(0, I) at the start only, so nothing is unbiased after a step of training.
    """

    gaussian_marginals: ClassVar[bool] = False
    row_norm: ClassVar[RowNorm] = "other"
    no_factor: ClassVar[str | None] = "the factors are drawn for good, so that nothing would be learned"
    paper: ClassVar[str] = "2110.08323"

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        return FastfoodMatrix(num_features, head_dim, generator)().detach()

    def build(self, num_features: int, head_dim: int, generator: torch.Generator) -> "FastfoodMatrix":
        return FastfoodMatrix(num_features, head_dim, generator)


class FastfoodMatrix(ProjectionMatrix):
    """The factors of Fastfood as parameters; forward() multiplies them out, O(F D^2) once per call."""

    def __init__(self, num_features: int, head_dim: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        size = padded_size(head_dim)
        num_blocks = math.ceil(num_features / size)
        self.num_features, self.head_dim = num_features, head_dim
        gaussian = torch.randn(num_blocks, size, generator=generator)
        norms = chi(num_blocks * size, size, generator).view(num_blocks, size)
        order = torch.rand(num_blocks, size, generator=generator).argsort(dim=-1)  # one uniform permutation per block
        self.signs = nn.Parameter(_signs((num_blocks, size), generator))  # B
        self.gaussian = nn.Parameter(gaussian)  # G
        self.scaling = nn.Parameter(norms / gaussian.norm(dim=-1, keepdim=True))  # S
        self.register_buffer("order", order)  # P
        self.register_buffer("hadamard", hadamard(size))
        self.register_buffer("weights", None)

    def forward(self) -> Tensor:
        left = self.scaling[:, :, None] * self.hadamard * self.gaussian[:, None, :]  # S H G [num_blocks, D, D]
        right = self.hadamard[self.order] * self.signs[:, None, :]  # P H B
        rows = (left @ right).flatten(0, 1) / math.sqrt(right.shape[-1])
        return rows[: self.num_features, : self.head_dim]


def padded_size(dim: int) -> int:
    """The smallest power of two that is at least dim."""
    return 1 << (dim - 1).bit_length()


def hadamard(size: int) -> Tensor:
    """The Sylvester matrix of +-1 [size, size], size a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


def _sign_products(num_factors: int, size: int, num_rows: int, generator: torch.Generator) -> Tensor:
    """[num_rows, size]: stacked orthonormal blocks prod_{i <= num_factors} (H L_i), H orthonormal."""
    num_blocks = math.ceil(num_rows / size)
    transform = hadamard(size) / math.sqrt(size)
    product = torch.eye(size).expand(num_blocks, size, size)
    for _ in range(num_factors):
        product = product @ transform * _signs((num_blocks, 1, size), generator)
    return product.flatten(0, 1)[:num_rows]


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1
