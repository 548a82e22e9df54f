"""Discrete features: means over the degrees are summed exactly, up to a degree where nothing is left.

Coefficients are float32 buffers, so features agree with their definition to 1e-6 in float64 too.
"""

import math

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape
from attention.feature_maps.discrete import GeometricRF, PoissonRF
from attention.linear import LinearAttention
from attention.normalizers import Normalizer
from tests.attention.conftest import build, draw, draw_qkv, padding

TOP = 60  # the largest degree of a coordinate in an exact sum


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(kind: str, dim: int, num_features: int, value: float | None = None, seed: int = 0, **options):
    shape = HeadShape(2, dim, 64)
    if kind == "poisson":
        return PoissonRF(shape, rng(seed), num_features=num_features, rate=value, **options).double()
    return GeometricRF(shape, rng(seed), num_features=num_features, success=value, **options).double()


def log_probability(m, degrees: Tensor) -> Tensor:
    if isinstance(m, PoissonRF):
        return degrees * math.log(m.rate) - m.rate - (degrees + 1).lgamma()
    return math.log(m.success) + degrees * math.log(1 - m.success)


def direct_features(m, x: Tensor) -> Tensor:
    """The definition, one power and one product per coordinate: x [.., D] scaled -> [.., M], without 1/sqrt(M)."""
    n, dim = m.degrees, x.shape[-1]
    monomial = (x.unsqueeze(-2) ** n).prod(dim=-1)
    if isinstance(m, PoissonRF):
        return math.exp(m.rate * dim / 2) * monomial * m.rate ** (-n.sum(dim=-1) / 2)
    factorials = (n + 1).lgamma().exp().prod(dim=-1)
    return m.success ** (-dim / 2) * monomial * (1 - m.success) ** (-n.sum(dim=-1) / 2) / factorials.sqrt()


def phi(m, x: Tensor) -> Tensor:
    """phi of scaled inputs."""
    found = m(x / m.scale, True)
    return found.values * found.logits.exp()


@pytest.mark.parametrize("kind", ["poisson", "geometric"])
def test_features_are_the_monomials_of_the_definition_with_their_gradients(kind: str) -> None:
    m = make(kind, 6, 40)
    x = draw(1, 2, 9, 6, seed=1).requires_grad_()
    torch.testing.assert_close(phi(m, x), direct_features(m, x) / math.sqrt(40), rtol=1e-6, atol=1e-14)
    probe = draw(1, 2, 9, 40, seed=2)
    fast = torch.autograd.grad((phi(m, x) * probe).sum(), x)[0]
    slow = torch.autograd.grad((direct_features(m, x) / math.sqrt(40) * probe).sum(), x)[0]
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["poisson", "geometric"])
def test_a_zero_coordinate_leaves_the_monomials_without_it(kind: str) -> None:
    m = make(kind, 6, 200)
    x = draw(1, 1, 4, 6, seed=1)
    x[..., 2] = 0
    x[:, :, 3] = 0
    x.requires_grad_()
    torch.testing.assert_close(phi(m, x), direct_features(m, x.detach()) / math.sqrt(200), rtol=1e-6, atol=1e-12)
    assert bool(torch.autograd.grad(phi(m, x).sum(), x)[0].isfinite().all())


@pytest.mark.parametrize(
    ("kind", "value"), [("poisson", 0.4), ("poisson", 1.3), ("geometric", 0.3), ("geometric", 0.8)]
)
def test_mean_and_second_moment_are_the_closed_forms(kind: str, value: float) -> None:
    """Exact sums over all degrees in two dimensions; no sampling."""
    m = make(kind, 2, 1, value)
    degrees = torch.cartesian_prod(*[torch.arange(TOP, dtype=torch.float64)] * 2)
    probability = log_probability(m, degrees).exp().prod(dim=-1)
    assert float(probability.sum()) == pytest.approx(1.0, rel=1e-8)
    m.degrees = degrees
    x, y = draw(5, 2, seed=1), draw(5, 2, seed=2)
    estimates = direct_features(m, x) * direct_features(m, y)
    torch.testing.assert_close(estimates @ probability, m.kernel(x, y), rtol=1e-8, atol=0)
    torch.testing.assert_close(m.kernel(x, y), (x * y).sum(dim=-1).exp())
    torch.testing.assert_close(estimates.square() @ probability, m.second_moment(x, y), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("kind", "value"), [("poisson", 0.4), ("geometric", 0.3)])
def test_degrees_follow_their_law(kind: str, value: float) -> None:
    """Frequencies of the degrees 0 to 4 among 400 000: 6 standard errors (2e-9 each)."""
    m = make(kind, 4, 100_000, value)
    for degree in range(5):
        probability = float(log_probability(m, torch.tensor(float(degree))).exp())
        frequency = float((m.degrees == degree).double().mean())
        assert abs(frequency - probability) < 6 * math.sqrt(probability * (1 - probability) / 400_000)


@pytest.mark.parametrize("kind", ["poisson", "geometric"])
def test_the_default_parameter_is_near_the_best_for_unit_variance(kind: str) -> None:
    """Mean log second moment over pairs of N(0, 1) queries and keys, against parameters a fifth away on both sides."""
    x, y = draw(2000, 32, seed=1, scale=32**-0.25), draw(2000, 32, seed=2, scale=32**-0.25)
    default = make(kind, 32, 1)
    best = float(default.second_moment(x, y).log().mean())
    if kind == "poisson":
        assert default.rate == pytest.approx(float((x * y).square().mean().sqrt()), rel=0.05)
        others = [default.rate * 0.8, default.rate * 1.2]
    else:
        others = [1 - (1 - default.success) * factor for factor in (0.6, 1.6)]
    assert all(float(make(kind, 32, 1, value).second_moment(x, y).log().mean()) > best for value in others)


@pytest.mark.parametrize("name", ["poisrf", "geomrf"])
def test_large_norms_stay_finite_in_float32(name: str) -> None:
    q, k, v = draw_qkv(40, scale=math.sqrt(50 / 16) * 2)  # |x|^2 = 50
    k[:, :, 3] *= 10
    low = [x.float().requires_grad_() for x in (q, k, v)]
    out = build(name, dtype=torch.float32)(*low, padding(40))
    gradients = torch.autograd.grad(out.square().sum(), low)
    assert all(bool(x.isfinite().all()) for x in (out, *gradients))


@pytest.mark.parametrize("name", ["poisrf", "geomrf"])
def test_zero_inputs_give_the_mean_of_the_values(name: str) -> None:
    """All kernels are 1 then, whatever was drawn, as long as one feature is constant."""
    v = draw(2, 2, 9, 16, seed=1)
    out = build(name)(torch.zeros_like(v), torch.zeros_like(v), v)
    torch.testing.assert_close(out, v.mean(dim=2, keepdim=True).expand_as(v))


def test_one_draw_per_head_is_an_option() -> None:
    shared, own = make("poisson", 6, 10), make("poisson", 6, 10, per_head=True)
    assert shared.degrees.shape == (10, 6)
    assert own.degrees.shape == (2, 10, 6)
    x = draw(1, 1, 9, 6, seed=1).expand(-1, 2, -1, -1)
    features = phi(own, x)
    assert features.shape == (1, 2, 9, 10)
    assert not torch.allclose(features[:, 0], features[:, 1])


@pytest.mark.parametrize(
    ("kind", "value"), [("poisson", 0.0), ("poisson", -1.0), ("geometric", 0.0), ("geometric", 1.0)]
)
def test_impossible_parameters_are_refused(kind: str, value: float) -> None:
    with pytest.raises(ValueError, match="must"):
        make(kind, 4, 8, value)


def test_a_plain_sum_is_refused_because_it_may_be_negative() -> None:
    with pytest.raises(ValueError, match="signed_clamp"):
        LinearAttention(
            HeadShape(2, 4, 64), rng(0), feature_map=lambda *_: make("poisson", 4, 8), normalizer=Normalizer("sum")
        )
