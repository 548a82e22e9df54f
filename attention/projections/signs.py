"""Owns the laws of rows with E[omega omega^T] = I, whose products estimate monomials: E (omega.x)(omega.y) = x.y."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from attention.projections.base import Projection


class MonomialLaw(Projection):
    """A law with closed-form moments of z(x) = prod_{j<=n} omega_j.x, the factors omega_j independent.

    Rows inside one block of `block(D)` consecutive rows may depend on each other; different blocks never do.
    """

    gaussian_marginals = False
    row_norm = "fixed"  # |omega| = sqrt(D)
    is_complex = False

    def block(self, head_dim: int) -> int:
        """Rows per block; 1 means that all rows are independent."""
        return 1

    @abstractmethod
    def factor_moment(self, x: Tensor, y: Tensor) -> Tensor:
        """rho = E[|omega.x|^2 |omega.y|^2] for x, y [..., D]."""

    def moment(self, degree: int, x: Tensor, y: Tensor) -> Tensor:
        """E[Re(z(x) conj z(y))^2] of one feature z of this degree."""
        return self.factor_moment(x, y) ** degree

    def pair_moment(self, degree: int, x: Tensor, y: Tensor) -> Tensor:
        """E[z(x) z(y) z'(x) z'(y)] of two features in the same block."""
        t = (x * y).sum(dim=-1)
        size = self.block(x.shape[-1])
        if size == 1:
            return t ** (2 * degree)
        # The whole block sums to size * t without error, which fixes the mean over its pairs.
        return (t**2 - (self.factor_moment(x, y) - t**2) / (size - 1)) ** degree


class Rademacher(MonomialLaw):
    """Independent signs +-1: rho = |x|^2 |y|^2 + 2 t^2 - 2 sum_c x_c^2 y_c^2 (Kar and Karnick, arXiv 1201.6530)."""

    paper = "1201.6530"

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        return _signs((num_features, head_dim), generator)

    def factor_moment(self, x: Tensor, y: Tensor) -> Tensor:
        norms, t, shared = _invariants(x, y)
        return norms + 2 * t**2 - 2 * shared


class SRHT(Rademacher):
    """Rows of H diag(signs), H the Hadamard matrix, without replacement inside a block (arXiv 2201.08712).

    Every single row is Rademacher; a whole block estimates x.y without error.
    """

    paper = "2201.08712"

    def __init__(self, *, zero_pad: bool) -> None:
        """`zero_pad`: when D is no power of two, use the first D columns of the next larger transform."""
        self.zero_pad = zero_pad

    def block(self, head_dim: int) -> int:
        size = 1 << (head_dim - 1).bit_length()
        if size != head_dim and not self.zero_pad:
            raise ValueError(
                f"SRHT needs a head_dim that is a power of two, got {head_dim}. Set projection.zero_pad=true, "
                "or use the Haar law, or choose model.dim and model.num_heads so that head_dim is one"
            )
        return size

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        size = self.block(head_dim)
        blocks = -(-num_features // size)
        order = torch.rand(blocks, size, generator=generator).argsort(dim=-1)  # random permutations
        rows = _hadamard(size)[order] * _signs((blocks, 1, size), generator)
        return rows.flatten(0, 1)[:num_features, :head_dim].contiguous()


class Haar(MonomialLaw):
    """sqrt(D) times the rows of uniformly random orthogonal matrices: rho = D / (D+2) (|x|^2 |y|^2 + 2 t^2).

    Any head_dim; otherwise as SRHT.
    """

    paper = "1610.09072"

    def block(self, head_dim: int) -> int:
        return head_dim

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        blocks = -(-num_features // head_dim)
        gaussian = torch.randn(blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # a unique factorisation: now q is Haar-distributed
        return (math.sqrt(head_dim) * q).flatten(0, 1)[:num_features].float().contiguous()

    def factor_moment(self, x: Tensor, y: Tensor) -> Tensor:
        norms, t, _ = _invariants(x, y)
        dim = x.shape[-1]
        return dim / (dim + 2) * (norms + 2 * t**2)


class ComplexRademacher(MonomialLaw):
    """Independent entries of {1, -1, i, -i}; one complex feature gives two real ones (CtR, arXiv 2202.02031).

    Better than twice as many real features where x and y share signs, t^2 > sum_c x_c^2 y_c^2; else neutral.
    """

    paper = "2202.02031"
    is_complex = True

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        """[F, D], complex64."""
        quarter_turns = torch.randint(4, (num_features, head_dim), generator=generator)
        return torch.tensor([1, 1j, -1, -1j], dtype=torch.complex64)[quarter_turns]

    def factor_moment(self, x: Tensor, y: Tensor) -> Tensor:
        norms, t, shared = _invariants(x, y)
        return norms + t**2 - shared

    def moment(self, degree: int, x: Tensor, y: Tensor) -> Tensor:
        _, t, shared = _invariants(x, y)
        unconjugated = 2 * t**2 - shared  # E[((omega.x) conj(omega.y))^2]
        return (self.factor_moment(x, y) ** degree + unconjugated**degree) / 2


def _invariants(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|x|^2 |y|^2, x.y, sum_c x_c^2 y_c^2."""
    x2, y2 = x.square(), y.square()
    return x2.sum(dim=-1) * y2.sum(dim=-1), (x * y).sum(dim=-1), (x2 * y2).sum(dim=-1)


def _signs(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(2, size, generator=generator).float() * 2 - 1


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix
