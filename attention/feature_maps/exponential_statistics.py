"""Owns the fit of exponential features to data: masked moments of q and k, and the closed-form optimum of T and A.

Legend: D head_dim, [..] leading axes, one fit each ([B, H] in a mechanism). Derivation in 2302.00787 (DERF).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

AStructure = Literal["zero", "scalar", "diag"]
TStructure = Literal["identity", "orthogonal", "diagonal", "full"]


class Moments(NamedTuple):
    """Means [.., 1, D] and covariances [.., D, D] of x (1) and y (2)."""

    mu1: Tensor
    mu2: Tensor
    covariance1: Tensor
    covariance2: Tensor

    @property
    def m1(self) -> Tensor:
        """E[x x']."""
        return self.covariance1 + _outer(self.mu1, self.mu1)

    @property
    def m2(self) -> Tensor:
        """E[y y']."""
        return self.covariance2 + _outer(self.mu2, self.mu2)

    def centred(self) -> "Moments":
        """The same with means 0: what the best key shift leaves of z."""
        return Moments(torch.zeros_like(self.mu1), torch.zeros_like(self.mu2), self.covariance1, self.covariance2)


@dataclass(frozen=True)
class Fit:
    """Parameters of f(w, x) = exp(w'Aw + w'B x + x'C x + const), with B = (I - 4A)^{1/2} T for x and T^{-1} for y.

    T is symmetric: T and O T with a rotation O give features of one law, since w and O'w have one law. So instead of a
    rotated T, A = Q' diag(a) Q is rotated back. This form has no sign or order of eigenvectors in it, and does not
    jump when two eigenvalues meet.
    """

    a: Tensor  # [.., D], all below 1/8: finite variance
    basis: Tensor | None  # Q [.., D, D]; None: identity
    t: Tensor | None  # [.., D, D], or [.., 1, D] when diagonal; None: identity
    t_inverse: Tensor | None
    shift: Tensor | None  # c [.., 1, D], subtracted from every key; None: 0

    @property
    def log_constant(self) -> Tensor:
        """log det(I - 4A) / 4 [..]: the logarithm of each side's constant factor."""
        return torch.log1p(-4 * self.a).sum(dim=-1) / 4

    def z(self, x: Tensor, y: Tensor) -> Tensor:
        """T x + T^{-1} (y - c), the one vector that the variance at (x, y) depends on."""
        if self.shift is not None:
            y = y - self.shift
        return transform(x, self.t) + transform(y, self.t_inverse)

    def log_second_moment(self, z: Tensor) -> Tensor:
        """log E[f1^2 f2^2] - 2 log K of one feature, z [.., L, D] -> [.., L]."""
        rotated = transform_transposed(z, self.basis)
        a = self.a.unsqueeze(-2)
        return _log_ratio(a) + (rotated.square() / (1 - 8 * a)).sum(dim=-1)

    def log_cross_moment(self, z: Tensor) -> Tensor:
        """log E[f1(w) f2(w) f1(-w) f2(-w)] - 2 log K, z [.., L, D] -> [.., L]."""
        return _log_ratio(self.a.unsqueeze(-2)) - z.square().sum(dim=-1)


def _log_ratio(a: Tensor) -> Tensor:
    """log det(I - 4A) - log det(I - 8A) / 2 over the last axis."""
    return (torch.log1p(-4 * a) - torch.log1p(-8 * a) / 2).sum(dim=-1)


def transform(x: Tensor, t: Tensor | None) -> Tensor:
    """T x for the rows of x [.., L, D], T symmetric: None (identity), [.., 1, D] (diagonal) or [.., D, D]."""
    if t is None:
        return x
    return x * t if t.shape[-2] == 1 else x @ t


def transform_transposed(x: Tensor, q: Tensor | None) -> Tensor:
    """Q x for the rows of x [.., L, D], Q [.., D, D] or None (identity)."""
    return x if q is None else x @ q.transpose(-2, -1)


def optimal_a(phi: Tensor) -> Tensor:
    """argmin_a log(1 - 4a) - log(1 - 8a) / 2 + phi / (1 - 8a) <= 0, elementwise, written without cancellation at 0."""
    return -phi / (1 - 2 * phi + ((2 * phi + 1).square() + 8 * phi).sqrt())


def moments(x: Tensor, y: Tensor, mask_x: Tensor | None = None, mask_y: Tensor | None = None) -> Moments:
    """x, y [.., L, D]; masks [.., L] True at padding (they broadcast over heads) or None."""
    mu1, covariance1 = _mean_and_covariance(x, mask_x)
    mu2, covariance2 = _mean_and_covariance(y, mask_y)
    return Moments(mu1, mu2, covariance1, covariance2)


def _mean_and_covariance(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is None:
        mask = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    count = (~mask).sum(dim=-1)[..., None, None]
    mean = x.masked_fill(mask.unsqueeze(-1), 0.0).sum(dim=-2, keepdim=True) / count
    deviations = (x - mean).masked_fill(mask.unsqueeze(-1), 0.0)
    # Matrices are tiny and their inverses are not forgiving: D x D algebra is in float64.
    return mean.double(), (deviations.transpose(-2, -1) @ deviations / count).double()


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.transpose(-2, -1) @ b


def fit(
    m: Moments, a_structure: AStructure, t_structure: TStructure, key_shift: bool, ridge: tuple[Tensor | float, ...]
) -> Fit:
    """The optimum of `objective` in closed form (for diag A: given T). `ridge`: relative ridges of m1 and m2.

    With `key_shift`, keys are moved by c = mu2 + T^2 mu1, the best constant: it makes the mean of z zero.
    """
    used = m.centred() if key_shift else m
    t, t_inverse = _fit_t(used, t_structure, ridge)
    shift = m.mu2 + transform(transform(m.mu1, t), t) if key_shift else None
    second = second_moment_of_z(used, t, t_inverse)
    basis = None
    if a_structure == "zero":
        phi = torch.zeros_like(second[..., 0])
    elif a_structure == "scalar":
        phi = second.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True).expand(second.shape[:-1])
    elif t_structure in ("orthogonal", "full"):
        phi, eigenvectors = torch.linalg.eigh(second)
        basis = eigenvectors.transpose(-2, -1)
    else:
        phi = second.diagonal(dim1=-2, dim2=-1)
    return Fit(optimal_a(phi.clamp_min(0.0)), basis, t, t_inverse, shift)


def second_moment_of_z(m: Moments, t: Tensor | None, t_inverse: Tensor | None) -> Tensor:
    """E[z z'] [.., D, D] for z = T x + T^{-1} y, x and y independent."""
    cross = _outer(transform(m.mu1, t), transform(m.mu2, t_inverse))
    return _congruent(m.m1, t) + _congruent(m.m2, t_inverse) + cross + cross.transpose(-2, -1)


def _congruent(m: Tensor, t: Tensor | None) -> Tensor:
    return transform(transform(m, t).transpose(-2, -1), t)


def objective(m: Moments, f: Fit) -> Tensor:
    """Mean over all pairs of log E[f1^2 f2^2] - 2 log K [..], for moments of the keys *after* their shift."""
    second = second_moment_of_z(m, f.t, f.t_inverse)
    if f.basis is not None:
        second = f.basis @ second @ f.basis.transpose(-2, -1)
    phi = second.diagonal(dim1=-2, dim2=-1)
    return _log_ratio(f.a) + (phi / (1 - 8 * f.a)).sum(dim=-1)


def _fit_t(m: Moments, structure: TStructure, ridge: tuple[Tensor | float, ...]) -> tuple[Tensor | None, Tensor | None]:
    if structure in ("identity", "orthogonal"):
        return None, None
    m1, m2 = with_ridge(m.m1, ridge[0]), with_ridge(m.m2, ridge[1])
    if structure == "diagonal":
        ratio = m2.diagonal(dim1=-2, dim2=-1) / m1.diagonal(dim1=-2, dim2=-1)
        t = ratio.pow(0.25).unsqueeze(-2)
        return t, 1 / t
    return _symmetric_roots(geometric_mean_of_inverse(m1, m2))


def with_ridge(m: Tensor, ridge: Tensor | float) -> Tensor:
    """m + ridge tr(m)/D I, and 1e-9 at least: an example with one real key has covariance 0."""
    dim = m.shape[-1]
    level = ridge * m.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None] / dim
    return m + (level + 1e-9) * torch.eye(dim, dtype=m.dtype, device=m.device)


def geometric_mean_of_inverse(m1: Tensor, m2: Tensor) -> Tensor:
    """S = m1^{-1} # m2, the symmetric positive solution of S m1 S = m2: it minimises tr(S m1) + tr(S^{-1} m2)."""
    root, inverse_root = _symmetric_roots(m1)
    middle, _ = _symmetric_roots(root @ m2 @ root)
    return inverse_root @ middle @ inverse_root


def _symmetric_roots(m: Tensor) -> tuple[Tensor, Tensor]:
    """m^{1/2}, m^{-1/2} of symmetric positive definite matrices."""
    values, vectors = torch.linalg.eigh((m + m.transpose(-2, -1)) / 2)
    values = values.clamp_min(torch.finfo(m.dtype).tiny).sqrt().unsqueeze(-2)
    transposed = vectors.transpose(-2, -1)
    return (vectors * values) @ transposed, (vectors / values) @ transposed
