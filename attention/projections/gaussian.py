"""Owns the two dense Gaussian projections: independent rows, and block-orthogonal rows."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attention.projections.base import Projection, RowNorm
from attention.projections.moments import characteristic_on_sphere, moment_on_sphere


@dataclass(frozen=True)
class Gaussian(Projection):
    """Independent N(0, 1) entries."""

    gaussian_marginals: ClassVar[bool] = True
    row_norm: ClassVar[RowNorm] = "chi"

    def block(self, head_dim: int) -> int:
        return 1

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        return torch.randn(num_features, head_dim, generator=generator)


@dataclass(frozen=True)
class Orthogonal(Projection):
    """Blocks of D orthogonal rows with a Haar distributed direction (1610.09072); the last block is truncated.

    `norms`: "chi" gives every row an independent chi(D) norm, so that it is N(0, I); "fixed" gives all of them sqrt(D)
    (called regularised in 2009.14794), which biases exponential and trigonometric features.
    """

    paper: ClassVar[str] = "1610.09072"
    norms: Literal["chi", "fixed"] = "chi"

    def __post_init__(self) -> None:
        if self.norms not in ("chi", "fixed"):
            raise ValueError(f"Orthogonal: norms must be chi or fixed, got {self.norms!r}")

    @property
    def gaussian_marginals(self) -> bool:  # type: ignore[override]
        return self.norms == "chi"

    @property
    def row_norm(self) -> RowNorm:  # type: ignore[override]
        return self.norms

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        num_blocks = math.ceil(num_features / head_dim)
        directions = haar_orthogonal(num_blocks, head_dim, generator).flatten(0, 1)[:num_features]
        if self.norms == "fixed":
            return directions * math.sqrt(head_dim)
        return directions * chi(num_features, head_dim, generator)

    def moment_generating(self, u: Tensor) -> Tensor:
        return moment_on_sphere(u, u.shape[-1])

    def characteristic(self, u: Tensor) -> Tensor:
        return characteristic_on_sphere(u, u.shape[-1])


def haar_orthogonal(num_blocks: int, dim: int, generator: torch.Generator) -> Tensor:
    """[num_blocks, dim, dim] orthogonal matrices, Haar distributed: QR with the signs of R's diagonal moved to Q."""
    gaussian = torch.randn(num_blocks, dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    signs = r.diagonal(dim1=-2, dim2=-1).sign()  # [num_blocks, dim]
    return (q * signs[:, None, :]).float()


def chi(num_rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """[num_rows, 1] independent norms of N(0, I) vectors of length dim."""
    return torch.randn(num_rows, dim, generator=generator).norm(dim=-1, keepdim=True)
