"""Owns what a single row of a projection does on average: E exp(w.u) and E cos(w.u), of which every kernel is made."""

from collections.abc import Callable

import torch
from torch import Tensor

from attention.projections.base import Projection


def moment_generating(law: Projection, u: Tensor) -> Tensor:
    """E exp(w.u) over one row w of the law, u [..., D] -> [...]: exp(|u|^2 / 2) for Gaussian rows."""
    if law.gaussian_marginals:
        return (u.square().sum(dim=-1) / 2).exp()
    return _own(law, "moment_generating")(u)


def characteristic(law: Projection, u: Tensor) -> Tensor:
    """E cos(w.u) over one row w of the law, u [..., D] -> [...]: exp(-|u|^2 / 2) for Gaussian rows."""
    if law.gaussian_marginals:
        return (-u.square().sum(dim=-1) / 2).exp()
    return _own(law, "characteristic")(u)


def _own(law: Projection, name: str) -> Callable[[Tensor], Tensor]:
    """A law whose rows are not Gaussian says itself what it knows of them, as a method."""
    if not hasattr(law, name):
        raise NotImplementedError(f"{type(law).__name__} has no closed form of its rows' {name} function")
    return getattr(law, name)


def moment_on_sphere(u: Tensor, dim: int) -> Tensor:
    """E exp(w.u), w uniform on the sphere of radius sqrt(dim): 0F1(; dim/2; dim |u|^2 / 4) < exp(|u|^2 / 2)."""
    return hypergeometric_0f1(dim / 2, dim * u.square().sum(dim=-1) / 4)


def characteristic_on_sphere(u: Tensor, dim: int) -> Tensor:
    """E cos(w.u), w uniform on the sphere of radius sqrt(dim): 0F1(; dim/2; -dim |u|^2 / 4)."""
    return hypergeometric_0f1(dim / 2, -dim * u.square().sum(dim=-1) / 4)


def hypergeometric_0f1(b: float, z: Tensor) -> Tensor:
    """sum_n z^n / ((b)_n n!), summed in float64. For z < 0 the terms alternate: about 6 digits are left at |u| = 6."""
    total = term = torch.ones_like(z, dtype=torch.float64)
    for n in range(400):
        term = term * z.double() / ((b + n) * (n + 1))
        total = total + term
        if bool((term.abs() <= 1e-17 * total.abs()).all()):
            break
    return total.to(z.dtype)
