"""The exponential family: exact kernels and variances of its features.

Gaussian means over w are computed on a dense Gauss-Hermite grid in two dimensions: the features are the rule's nodes,
so unbiasedness and second moments are checked to quadrature accuracy and not by sampling.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape
from attention.feature_maps.exponential import Exponential
from attention.feature_maps.exponential_statistics import (
    Fit,
    optimal_a,
)
from attention.projections.base import Projection, ProjectionMatrix
from attention.projections.gaussian import Gaussian, Orthogonal
from attention.projections.quadrature import gauss_hermite
from tests.attention.conftest import draw

STRUCTURES = {  # name -> a_structure, t_structure
    "posrf": ("zero", "identity"),
    "oprf": ("scalar", "identity"),
    "saderf": ("scalar", "diagonal"),
    "aderf": ("scalar", "full"),
    "sderf": ("diag", "orthogonal"),
    "diag": ("diag", "diagonal"),
    "full": ("diag", "full"),
    "diag_a": ("diag", "identity"),
    "balanced_posrf": ("zero", "full"),
}
GOLDEN_X, GOLDEN_Y = (torch.tensor(v, dtype=torch.float64) for v in ((0.5, -0.2, 0.1, 0.4), (0.3, 0.1, -0.6, 0.2)))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class DenseGrid(Projection):
    """All pairs of nodes of a Gauss-Hermite rule, with their weights: Gaussian means in two dimensions, no sampling."""

    gaussian_marginals: ClassVar[bool] = True
    row_norm: ClassVar[str] = "chi"
    num_nodes: int = 70

    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        nodes, _ = gauss_hermite(self.num_nodes)
        return torch.cartesian_prod(nodes, nodes)

    def build(self, num_features: int, head_dim: int, generator: torch.Generator) -> ProjectionMatrix:
        _, weights = gauss_hermite(self.num_nodes)
        weights = torch.cartesian_prod(weights, weights).prod(dim=1)
        return ProjectionMatrix(self.sample(num_features, head_dim, generator), weights)


def make(
    name: str, *, dim: int, num_features: int, law: Projection | None = None, seed: int = 0, **options
) -> Exponential:
    a, t = STRUCTURES[name]
    ridge = 1e-3 if t in ("diagonal", "full") else None
    return Exponential(
        HeadShape(1, dim, 64), rng(seed), projection=law or Gaussian(), num_features=num_features,
        a_structure=a, t_structure=t, ridge=ridge, **options,
    )  # fmt: skip


def on_grid(name: str, **options) -> Exponential:
    return make(name, dim=2, num_features=70**2, law=DenseGrid(), **options).double()


def features(m: Exponential, x: Tensor, is_query: bool, prepared) -> Tensor:
    """phi of inputs that are scaled already."""
    found = m(x / m.scale, is_query, prepared)
    return (1 if found.values is None else found.values) * found.logits.exp()


def single_estimates(m: Exponential, x: Tensor, y: Tensor, prepared) -> Tensor:
    """One estimate of the kernel per row w: [.., L, M]."""
    products = features(m, x, True, prepared) * features(m, y, False, prepared)
    return products.unflatten(-1, (-1, m.projection.num_rows)).sum(dim=-2)


def skewed(length: int, dim: int, seed: int = 0, mean: float = 0.5) -> tuple[Tensor, Tensor]:
    """x and y [1, 1, L, D] with unequal, correlated covariances and means."""
    mix_x, mix_y = (0.6 * torch.randn(dim, dim, generator=rng(seed + i), dtype=torch.float64) for i in (1, 2))
    x = draw(1, 1, length, dim, seed=seed + 3, scale=0.4) @ mix_x - 0.3 * mean
    y = draw(1, 1, length, dim, seed=seed + 4, scale=0.4) @ mix_y + mean
    return x, y


def dense(found: Fit) -> tuple[Tensor, Tensor]:
    """A, T [D, D] of a fit to one example and head."""
    identity = torch.eye(found.a.shape[-1], dtype=found.a.dtype)
    basis = identity if found.basis is None else found.basis[0, 0]
    t = identity if found.t is None else found.t[0, 0]
    return basis.T @ torch.diag(found.a[0, 0]) @ basis, torch.diag(t[0]) if t.shape[0] == 1 else t


def random_fit(dim: int, seed: int) -> Fit:
    """Admissible and far from any optimum."""
    g = rng(seed)
    a = 0.04 - 0.5 * torch.rand(dim, generator=g, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q
    half = torch.randn(dim, dim, generator=g, dtype=torch.float64) / dim**0.5
    t = half @ half.T / 2 + 0.7 * torch.eye(dim, dtype=torch.float64)
    return Fit(a, basis, t, t.inverse(), 0.3 * torch.randn(1, dim, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("hyperbolic", [False, True])
def test_any_admissible_parameters_estimate_the_softmax_kernel_with_the_stated_second_moment(seed, hyperbolic) -> None:
    m = on_grid("full", hyperbolic=hyperbolic)
    prepared = m.prepare_fit(random_fit(2, seed))
    x, y = draw(1, 1, 5, 2, seed=seed + 50), draw(1, 1, 5, 2, seed=seed + 60)
    estimates = single_estimates(m, x, y, prepared)  # times the weights of the rule
    torch.testing.assert_close(estimates.sum(dim=-1), (x * y).sum(dim=-1).exp(), rtol=1e-7, atol=0)
    weights = m.projection.heads[0].weights
    second = (estimates / weights).square() @ weights
    torch.testing.assert_close(second, m.second_moment(x, y, prepared), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_fitted_structure_is_unbiased_with_the_stated_second_moment(name: str, shift: bool) -> None:
    m = on_grid(name, key_shift=shift)
    x, y = skewed(40, 2)
    prepared = m.prepare_scaled(x, y)
    estimates = single_estimates(m, x, y, prepared)
    torch.testing.assert_close(estimates.sum(dim=-1), m.kernel(x, y), rtol=1e-6, atol=0)
    torch.testing.assert_close(m.kernel(x, y), (x * y).sum(dim=-1).exp())
    weights = m.projection.heads[0].weights
    closed = m.second_moment(x, y, prepared)
    torch.testing.assert_close((estimates / weights).square() @ weights, closed, rtol=1e-3, atol=0)
    torch.testing.assert_close(m.second_moment(x, y), closed)  # without `prepared`: fitted to these x and y


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "posrf"])
def test_the_two_sides_satisfy_the_constraint_of_unbiasedness(name: str) -> None:
    """B1' (I - 4A)^{-1} B2 = I, with B read back from what multiplies the inputs."""
    m = make(name, dim=5, num_features=40).double()
    prepared = m.prepare_scaled(*skewed(60, 5))
    w, found = m.projection().double(), prepared.fit
    b1, b2 = (torch.linalg.lstsq(w, weight[0, 0]).solution for weight in (prepared.weight_q, prepared.weight_k))
    basis = torch.eye(5, dtype=torch.float64) if found.basis is None else found.basis[0, 0]
    a = basis.T @ torch.diag(found.a[0, 0]) @ basis
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(b1.T @ torch.linalg.inv(identity - 4 * a) @ b2, identity, atol=1e-9, rtol=0)


def test_golden_second_moments_of_one_feature() -> None:
    x, y = GOLDEN_X[None], GOLDEN_Y[None]
    square = (2 * (x * y).sum(dim=-1)).exp()

    def variance(m: Exponential, prepared=None) -> float:
        return float(m.second_moment(x, y, prepared) - square)

    assert variance(make("posrf", dim=4, num_features=1)) == pytest.approx(3.40896244, rel=1e-8)
    assert variance(make("posrf", dim=4, num_features=1, hyperbolic=True)) == pytest.approx(1.22099826, rel=1e-8)
    oprf = make("oprf", dim=4, num_features=1).double()
    prepared = oprf.prepare_fit(Fit(optimal_a((x + y).square().mean(dim=-1)).expand(4), None, None, None, None))
    assert float(prepared.fit.a[0]) == pytest.approx(-0.11908001, rel=1e-7)
    assert variance(oprf, prepared) == pytest.approx(1.85646692, rel=1e-8)
    # one token: its own statistics are |x + y|^2 / D
    assert variance(oprf) == pytest.approx(1.85646692, rel=1e-8)


def test_sampled_gaussian_features_have_the_closed_form_mean_and_variance() -> None:
    """The harness of rule U13; false alarm 2e-9 for the mean at 6 standard errors."""
    m = make("sderf", dim=4, num_features=400_000, key_shift=True).double()
    x, y = skewed(50, 4)
    prepared = m.prepare_scaled(x, y)
    x, y = x[..., :3, :], y[..., :3, :]
    estimates = single_estimates(m, x, y, prepared) * 400_000
    k, second = m.kernel(x, y), m.second_moment(x, y, prepared)
    standard_error = ((second - k**2) / 400_000).sqrt()
    assert bool(((estimates.mean(dim=-1) - k).abs() < 6 * standard_error).all())
    torch.testing.assert_close(estimates.var(dim=-1), second - k**2, rtol=0.1, atol=0)


def test_orthogonal_rows_are_less_correlated_than_independent_ones() -> None:
    """Two rows of a block have E exp((w + w').u) = 1F1(D; D/2; |u|^2 / 2), below exp(|u|^2) of independent rows.

    Hence the smaller variance. 40 000 blocks at 6 standard errors (2e-9); the two values are further apart than that.
    """
    u = torch.full((16,), 0.3, dtype=torch.float64)  # x + y, |u|^2 = 1.44
    n = torch.arange(1, 60, dtype=torch.float64)
    expected = float(1 + ((n - 1 + 16) / (n - 1 + 8) * 0.72 / n).cumprod(dim=0).sum())
    rows = Orthogonal().sample(16 * 40_000, 16, rng(0)).view(-1, 16, 16).double()
    values = (rows @ u).cosh()  # the mean over the rows' signs, which are free
    products = (values.sum(dim=1).square() - values.square().sum(dim=1)) / (16 * 15)
    standard_error = float(products.std()) / 200
    assert abs(float(products.mean()) - expected) < 6 * standard_error
    assert expected < math.exp(1.44) - 6 * standard_error


def test_biased_rows_have_the_mean_that_kernel_states() -> None:
    """Rows of one norm, 50 000 blocks: the mean is 0F1's and not exp(x.y); 6 standard errors."""
    m = make("posrf", dim=4, num_features=4 * 50_000, law=Orthogonal(norms="fixed"), allow_biased=True).double()
    x, y = GOLDEN_X[None, None, None], GOLDEN_Y[None, None, None]
    blocks = single_estimates(m, x, y, m.prepare_scaled(x, y)).unflatten(-1, (-1, 4)).sum(dim=-1) * 50_000
    standard_error = float(blocks.std()) / math.sqrt(50_000)
    assert abs(float(blocks.mean() - m.kernel(x, y))) < 6 * standard_error
    assert abs(float(m.kernel(x, y) - (x * y).sum(-1).exp())) > 12 * standard_error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a_structure": "scalar", "t_structure": "orthogonal"}, "only turns w"),
        ({"a_structure": "full", "t_structure": "identity"}, "zero, scalar or diag"),
        ({"a_structure": "diag", "t_structure": "square"}, "identity, orthogonal"),
        ({"a_structure": "diag", "t_structure": "full"}, "needs a `ridge`"),
        ({"a_structure": "diag", "t_structure": "orthogonal", "ridge": 1e-3}, "no use for a `ridge`"),
        ({"a_structure": "zero", "t_structure": "identity", "epsilon": -1.0}, "must not be negative"),
    ],
)
def test_settings_that_would_do_nothing_or_harm_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Exponential(HeadShape(2, 8, 64), rng(0), projection=Gaussian(), num_features=8, **options)
